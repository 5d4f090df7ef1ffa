"""`python -m sigma_kernels.export FOLDER`: the kernels as a repository of the Hub's kernel library.

    from kernels import get_kernel
    sigma_moe = get_kernel("<organisation>/sigma-moe", version=1)
    sigma_moe.moe_mlp(...)

The kernels are Python only, so a variant is a copy of the modules that `sigma_kernels` itself imports, with metadata.
A copy registers its operators under a name of its own, made from a hash of its sources: loaded beside the installed
package, or beside another version of itself, neither replaces the other's.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path


PACKAGE = Path(__file__).parent
NAME = "sigma-moe"
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
_NAMESPACE = re.compile(r"\bsigma_kernels(?=::)|(?<=torch\.ops\.)sigma_kernels\b")
_CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# {name}

A mixture-of-experts SwiGLU layer in Triton, differentiable, for the weights of transformers
(`gate_up_proj (E, 2 I, H)`, `down_proj (E, H, I)`).

```python
from kernels import get_kernel

kernel = get_kernel("<organisation>/{name}", version={version}, trust_remote_code=True)
out = kernel.moe_mlp(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)
```

Variants: {variants}. `cpu` needs `TRITON_INTERPRET=1` and is for tests. Exported from hf-sigma by
`python -m sigma_kernels.export`.
"""


def modules(package: Path = PACKAGE) -> list[Path]:
    """The files of `package` that importing it imports, itself first. A subpackage would need more than this."""
    found, queue = [], [package / "__init__.py"]
    while queue:
        path = queue.pop(0)
        if path in found:
            continue
        found.append(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                queue += [package / f"{name}.py" for name in names]
    return found


def export(folder: Path, *, version: int = 1, backends: tuple[str, ...] = ("cuda",)) -> list[Path]:
    """Write the repository into `folder`; returns its variants.

    Raises:
        FileExistsError: `folder` has a `build` already.
    """
    build = folder / "build"
    if build.exists():
        raise FileExistsError(f"{build} exists: export into another folder, or remove it.")
    sources = {path.name: path.read_text(encoding="utf-8") for path in modules()}
    tuned = sorted((PACKAGE / "tuned").glob("*.json"))
    digest = hashlib.sha256("\0".join([*sources, *sources.values()]).encode()).hexdigest()[:10]
    variants = []
    for backend in backends:
        unique = f"_{NAME.replace('-', '_')}_{backend}_{digest}"
        variant = build / f"torch-{backend}"
        variant.mkdir(parents=True)
        for name, text in sources.items():
            (variant / name).write_text(_NAMESPACE.sub(unique, text), encoding="utf-8")
        if tuned:
            (variant / "tuned").mkdir()
        for path in tuned:
            shutil.copy(path, variant / "tuned")
        metadata = {
            "name": NAME,
            "id": unique,
            "version": version,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    names = ", ".join(f"`{variant.name}`" for variant in variants)
    (folder / "README.md").write_text(_CARD.format(name=NAME, version=version, variants=names), encoding="utf-8")
    return variants


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sigma_kernels.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", type=int, default=1, help="of the kernel, as `get_kernel` asks for it")
    parser.add_argument("--backends", nargs="+", default=("cuda",), choices=BACKENDS)
    options = parser.parse_args(arguments)
    try:
        variants = export(options.folder, version=options.version, backends=tuple(options.backends))
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 2
    for variant in variants:
        print(variant)
    print(f"Upload it with: hf upload --repo-type kernel <organisation>/{NAME} {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
