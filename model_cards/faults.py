"""What was done to real runs to see whether they survive it: `model_cards/reliability/faults.json` and its card.

    make faults

runs the tests that carry `@pytest.mark.fault`, which write the file, and renders it:

    python -m model_cards.faults
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from model_cards.markdown import inline
from trainers.report import write_text_atomically


FOLDER = Path(__file__).parent / "reliability"
FAULTS_NAME = "faults.json"
COMMAND = "make faults"


@dataclass(kw_only=True)
class Fault:
    """One kind of fault.

    Args:
        fault (`str`): what was done, for people; unique in its table.
        survived_if (`str`): what had to be true afterwards.
        injected (`int`): how many times it was done.
        survived (`int`): how many of them ended as `survived_if` says.
        saves_lost (`int`, *optional*): of the saves that had begun, the most that one fault cost; None where nothing
            is saved.
    """

    fault: str
    survived_if: str
    injected: int
    survived: int
    saves_lost: int | None = None

    def __post_init__(self):
        if not 0 <= self.survived <= self.injected or self.injected == 0:
            raise ValueError(
                f"{FAULTS_NAME}: fault {self.fault!r}: survived={self.survived} of injected={self.injected}. "
                f"Write the file again with `{COMMAND}`."
            )


@dataclass(kw_only=True)
class FaultTable:
    """All of them; `versions` and `device` as in [`~trainers.report.Results`]."""

    versions: dict[str, str]
    device: str
    rows: list[Fault]


def write_faults(folder: str | Path, table: FaultTable) -> Path:
    """Write `folder/faults.json`; makes the folder if there is none."""
    path = Path(folder) / FAULTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(asdict(table), indent=2) + "\n")
    return path


def read_faults(folder: str | Path = FOLDER) -> FaultTable:
    """Read `folder/faults.json`.

    Raises:
        ValueError: a value outside the schema.
    """
    path = Path(folder) / FAULTS_NAME
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        return FaultTable(**payload | {"rows": [Fault(**row) for row in payload["rows"]]})
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is outside the schema ({error}). Write it again with `{COMMAND}`.") from error


def faults_card(table: FaultTable) -> str:
    """The card: the same bytes for the same table."""
    lines = [
        "| Fault | Injected | Survived | Saves lost, at most | Survived means |",
        "|---|---:|---:|---:|---|",
        *(
            f"| {inline(row.fault)} | {row.injected} | {row.survived} "
            f"| {'-' if row.saves_lost is None else row.saves_lost} | {inline(row.survived_if)} |"
            for row in table.rows
        ),
    ]
    table_of_rows = "\n".join(lines)
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    return f"""# What the reliability set survives

Faults done to real training runs in processes of their own, tiny models on the CPU, by the tests of hf-sigma on
{inline(table.device)} with {versions}. Where two ranks are named, they are gloo processes; nothing here was tried on
several machines or on GPUs.

{table_of_rows}

A save that is lost is one that had begun: the run goes on from the checkpoint before it, and ends with the same bits.

```bash
{COMMAND}
```
"""


def main() -> int:
    """Render the committed table."""
    path = FOLDER / "README.md"
    write_text_atomically(path, faults_card(read_faults()))
    print(path.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
