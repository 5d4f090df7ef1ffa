import re
import sys

import pytest

from tests.ecosystem.declarations import SUITE_ROWS, SUITES
from tests.transformers_suite.archive import unpack


# Spawned ranks inherit sys.path and import the same package.
sys.path.insert(0, str(unpack()))

from hf_tests import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402


try:
    from hf_tests import test_expert_parallel_mixin
except ImportError:  # before 5.20 the expert-parallel tests are part of the tensor-parallel ones
    test_expert_parallel_mixin = None


# Marks of the archive's files and of transformers.testing_utils, which --strict-markers would refuse.
FOREIGN_MARKERS = """
    accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test is_expert_parallel_test is_fsdp_test
    is_tensor_parallel_test is_training_test order torch_compile_test
""".split()


def pytest_configure(config):
    for name in FOREIGN_MARKERS:
        config.addinivalue_line("markers", f"{name}: transformers' own")


@pytest.hookimpl(tryfirst=True)  # before the marks are read
def pytest_collection_modifyitems(items):
    for item in items:
        method = SUITES.get(item.cls.__name__) if item.cls else None
        for feature, names in SUITE_ROWS.items():
            if method and re.fullmatch(names, item.name):
                item.add_marker(pytest.mark.compatibility(feature, library="torch", method=method, gloo=True))


# Otherwise each is a list of built-in model types, and every other model's distributed tests skip.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
if test_expert_parallel_mixin is not None:
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
# Ranks are processes here, not devices: two cores hold as many as the largest of these tests asks for.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8
