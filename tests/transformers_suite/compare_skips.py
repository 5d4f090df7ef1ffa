"""Fails if a model of ours skips a common test that the built-in Qwen3-MoE runs in the same harness.

    python tests/transformers_suite/compare_skips.py JUNIT_XML

A skip whose reason lies in the machine (no accelerator, no deepspeed) is a skip of both and passes; one whose reason
lies in the model (no SDPA, no FSDP plan) is a skip of ours alone.
"""

import sys
from collections import defaultdict
from xml.etree import ElementTree


YARDSTICK = "Qwen3MoeTest"


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
    """What the yardstick runs and another class skips or lacks, a line each."""
    if YARDSTICK not in outcomes or len(outcomes) < 2:
        return [f"nothing to compare: the report holds {sorted(outcomes)}, not {YARDSTICK} and a model of ours"]
    ran = sorted(name for name, reason in outcomes[YARDSTICK].items() if reason is None)
    findings = []
    for model, tests in sorted(outcomes.items()):
        for name in ran:
            reason = tests.get(name, "the test does not exist for this model")
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
        sys.exit(f"{len(findings)} tests run for {YARDSTICK} and not for ours")
    print(f"every common test that {YARDSTICK} runs, ours run too")


if __name__ == "__main__":
    main()
