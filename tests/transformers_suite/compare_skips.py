"""Fails if a model of ours skips a common test that the built-in model of its kind runs in the same harness.

    python tests/transformers_suite/compare_skips.py JUNIT_XML

A skip whose reason lies in the machine (no accelerator, no deepspeed) is a skip of both and passes; one whose reason
lies in the model (no SDPA, no FSDP plan) is a skip of ours alone.
"""

import sys
from collections import defaultdict
from xml.etree import ElementTree


YARDSTICK = "Qwen3MoeTest"
# Encoders: BERT has learned positions, EuroBERT rotary ones.
YARDSTICKS_OF = {"M3BertTest": "BertTest", "M3BertRopeTest": "EuroBertTest"}


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
            if reason is not None:
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
