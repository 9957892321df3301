"""What authors of backends and policies run against their own classes; `stateful` needs hypothesis, the rest only torch.

`conformance`: `check_backend` and `check_policy` name the rule that a class breaks.
`faults`: backends that fail, wait, or keep values in the plainest way.
`values`: tensors of every dtype and layout, compared bit by bit.
`twin`: a store and a plain dict that get the same operations; `stateful` drives it at random.
"""

from tierstore.testing.conformance import ConformanceError, check_backend, check_policy
from tierstore.testing.faults import Delays, DictBackend, Faults, InjectedError, wrap

__all__ = ["ConformanceError", "Delays", "DictBackend", "Faults", "InjectedError", "check_backend", "check_policy", "wrap"]
