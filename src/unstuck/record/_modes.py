"""Puts a torch function mode below the script's own, and takes it out wherever it stands.

A `with torch.device(...)` of the script takes off the topmost mode when it ends, whatever that is, so a mode of ours
never stands above one of the script's. `torch.set_default_device` wants to be the lowest, and stays it.
"""

from collections.abc import Sequence

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


def insert(mode: TorchFunctionMode) -> None:
    """Puts `mode` at the bottom of the stack of modes, above a default device."""
    stack = _get_current_function_mode_stack()
    default = 1 if stack and hasattr(stack[0], "old_device") else 0  # what torch.set_default_device has entered
    _restack(stack, [*stack[:default], mode, *stack[default:]])


def remove(mode: TorchFunctionMode) -> bool:
    """Takes `mode` out of the stack; False where this thread does not have it, or is inside a call that it sees."""
    stack = _get_current_function_mode_stack()
    rest = [other for other in stack if other is not mode]
    _restack(stack, rest)
    return len(rest) < len(stack)


def _restack(was: Sequence[TorchFunctionMode], now: Sequence[TorchFunctionMode]) -> None:
    same = 0
    while same < min(len(was), len(now)) and was[same] is now[same]:
        same += 1
    for _ in was[same:]:
        _pop_mode()
    for mode in now[same:]:
        _push_mode(mode)
