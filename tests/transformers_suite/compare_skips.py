"""Fails if a model of ours skips a common test that the built-in model of its kind runs in the same harness.

    python tests/transformers_suite/compare_skips.py JUNIT_XML

A skip whose reason lies in the machine (no accelerator, no deepspeed) is a skip of both and passes; one whose reason
lies in the model (no SDPA, no FSDP plan) is a skip of ours alone.
"""

import re
import sys
from collections import defaultdict
from xml.etree import ElementTree


YARDSTICK = "Qwen3MoeTest"
# Encoders: BERT has learned positions, EuroBERT rotary ones. Image classifiers: ViT. Dense language models: Llama.
YARDSTICKS_OF = {
    "M3BertTest": "BertTest",
    "M3BertRopeTest": "EuroBertTest",
    "DotCbmTest": "ViTTest",
    "DotCbmFrozenTest": "ViTTest",
    "DcCclTest": "ViTTest",
    "DcCclDeviceTest": "ViTTest",
    "DcCclLmTest": "LlamaTest",
    "PersonalLmTest": "LlamaTest",
    "PersonalLmClassifierTest": "BertTest",
    "CtrTest": "ViTTest",
    "CtrDinTest": "ViTTest",
}
# What a family has none of, as transformers' tests say it: a skip for this reason is no finding.
NO_BODY = "not in MODEL_MAPPING|no `base_model_class`"  # heads around models of other families
NO_OWN_HEAD = f"{NO_BODY}|locate the classification Linear layer"  # it lies in each submodel
NO_OWN_EMBEDDINGS = f"{NO_BODY}|doesn't use `inputs_embeds`"  # each submodel has its own, of its own width
NO_LAYERS = (  # tables, an MLP and one logit
    "attention|hidden states|TP plan|sdpa|one problem type|_mismatched_shapes|does not exist|No conversion found"
    "|capture_outputs"
)
EXCUSED = {
    "DcCclTest": NO_OWN_HEAD,
    "DcCclDeviceTest": NO_OWN_HEAD,
    "DcCclLmTest": NO_OWN_EMBEDDINGS,
    "PersonalLmTest": NO_BODY,
    "PersonalLmClassifierTest": NO_BODY,
    "CtrTest": NO_LAYERS,
    "CtrDinTest": NO_LAYERS,
}


def read(junit: str) -> dict[str, dict[str, str | None]]:
    """Test class -> test name -> reason of its skip, None if it ran."""
    outcomes = defaultdict(dict)
    for case in ElementTree.parse(junit).iter("testcase"):
        skipped = case.find("skipped")
        # The attribute is "" where a reason was not given: still a skip.
        reason = None if skipped is None else skipped.get("message") or "no reason given"
        outcomes[case.get("classname").rsplit(".", 1)[-1]][case.get("name")] = reason
    return dict(outcomes)


def compare(outcomes: dict[str, dict[str, str | None]]) -> list[str]:
    """What its yardstick runs and a class of ours skips or lacks, a line each."""
    ours = sorted(outcomes.keys() - {YARDSTICK, *YARDSTICKS_OF.values()})
    if not ours:
        return [f"nothing to compare: the report holds {sorted(outcomes)}, and no model of ours"]
    findings = []
    for model in ours:
        yardstick = YARDSTICKS_OF.get(model, YARDSTICK)
        if yardstick not in outcomes:
            findings.append(f"nothing to compare {model} with: the report does not hold {yardstick}")
        for name in sorted(name for name, reason in outcomes.get(yardstick, {}).items() if reason is None):
            reason = outcomes[model].get(name, "the test does not exist for this model")
            if reason is not None and not re.search(EXCUSED.get(model, "$^"), reason):
                findings.append(f"{model}::{name}: {reason}")
    return findings


def main() -> None:
    outcomes = read(sys.argv[1])
    for model, tests in sorted(outcomes.items()):
        skipped = sum(reason is not None for reason in tests.values())
        print(f"{model}: {len(tests) - skipped} ran, {skipped} skipped")
    findings = compare(outcomes)
    for finding in findings:
        print(f"  {finding}")
    if findings:
        sys.exit(f"{len(findings)} tests run for a built-in model and not for ours")
    print("every common test that the built-in models run, ours run too")


if __name__ == "__main__":
    main()
