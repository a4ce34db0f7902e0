"""Module calls in a traceback as they are without global hooks: with ours, torch takes a longer way to forward()."""

import dis
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType, TracebackType

from torch import nn

_CALL = nn.Module._call_impl.__code__  # noqa: SLF001
_LONGER = next((c for c in _CALL.co_consts if isinstance(c, CodeType) and c.co_name == "inner"), None)
_SHORT = next((i for i in dis.get_instructions(_CALL) if i.opname == "CALL_FUNCTION_EX"), None)


def direct(traces: Sequence[TracebackType]) -> Iterator[tuple[FrameType, int, int]]:
    """The frame, instruction and line of each part of a traceback, the longer way taken out of it."""
    longer = False
    for one, following in zip(traces, [*traces[1:], None], strict=True):
        was, longer = longer, following is not None and _takes_longer(one, following)
        if longer and _SHORT is not None and _SHORT.positions is not None:
            yield one.tb_frame, _SHORT.offset, _SHORT.positions.lineno or one.tb_lineno
        elif not was:
            yield one.tb_frame, one.tb_lasti, one.tb_lineno


def _takes_longer(one: TracebackType, following: TracebackType) -> bool:
    """Whether a module without hooks of its own is called as if it had some."""
    if one.tb_frame.f_code is not _CALL or following.tb_frame.f_code is not _LONGER or _SHORT is None:
        return False
    module = one.tb_frame.f_locals["self"]
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks  # noqa: SLF001
    )
