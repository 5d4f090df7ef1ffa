"""Without flwr everything else works, and who asks for the Flower engine is told what to install."""

import subprocess
import sys


CODE = """
import sys
sys.modules["flwr"] = None  # as if it were not installed
import trainers.benchmarks.__main__, trainers.federated.trainer
print("all else is there")
import trainers.federated.engines.flower
"""


def test_all_else_works_and_the_remedy_is_told():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout == "all else is there\n", done.stderr
    assert (
        done.returncode and 'ImportError: The Flower engine needs flwr: pip install "hf-sigma[flower]"' in done.stderr
    )
