"""What the recorder knows of torch's calls by their names: which only look, which write, draw, read back or cut."""

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

PROPERTIES = frozenset(  # attributes that tell about a tensor or its gradient, and are no part of the path to the loss
    "shape dtype device grad requires_grad is_leaf grad_fn ndim _version layout is_cuda is_cpu is_sparse is_quantized "
    "is_meta names is_nested itemsize nbytes output_nr is_mps is_xla _backward_hooks is_mkldnn retains_grad "
    "_post_accumulate_grad_hooks is_sparse_csr is_xpu is_mtia is_vulkan is_ipu is_maia name volatile _cdata "
    "_has_symbolic_sizes_strides grad_dtype".split()
)
METADATA = frozenset(  # methods that do the same
    "size dim stride numel nelement ndimension element_size storage_offset data_ptr get_device is_contiguous "
    "is_floating_point is_complex is_signed is_same_size is_set_to is_inference is_conj is_neg __len__ __hash__ "
    "__repr__ __str__ __format__ result_type can_cast retain_grad requires_grad_ has_names is_shared is_pinned "
    "dim_order untyped_storage storage _typed_storage is_coalesced sparse_dim dense_dim register_post_accumulate_grad_"
    "hook _is_view is_nested_tensor __dir__ is_tensor is_storage".split()
)
SHAPES = frozenset("shape nbytes size numel nelement __len__ stride".split())  # may steer where the data decide them
RANDOM = frozenset(  # may draw from the global generator
    "dropout dropout1d dropout2d dropout3d dropout_ alpha_dropout alpha_dropout_ feature_alpha_dropout feature_dropout "
    "feature_dropout_ feature_alpha_dropout_ native_dropout _fused_dropout rrelu rrelu_ rrelu_with_noise "
    "rrelu_with_noise_ scaled_dot_product_attention multi_head_attention_forward gru lstm rnn_tanh rnn_relu miopen_rnn "
    "_cudnn_rnn gumbel_softmax bernoulli bernoulli_ multinomial normal normal_ uniform_ random_ exponential_ rand_like "
    "randn_like randint_like poisson binomial fractional_max_pool2d fractional_max_pool3d log_normal_ cauchy_ "
    "geometric_ fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices _standard_gamma "
    "_sample_dirichlet trunc_normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_ orthogonal_ "
    "sparse_".split()
)
CUTS = frozenset("detach detach_ data numpy __array__ tolist item".split())
STATISTICS = frozenset(  # write into arguments other than the first, and the versions do not tell
    "batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit".split()
)
RECURRENT = frozenset("gru lstm rnn_tanh rnn_relu".split())
_ELASTIC = frozenset(  # the shape of the result depends on the numbers in the arguments
    "nonzero argwhere masked_select unique unique_consecutive repeat_interleave bincount one_hot tensor_split "
    "_pack_padded_sequence _pad_packed_sequence arange unique_dim _unique2".split()
)


_IN_PLACE = frozenset(f"__i{operator}__" for operator in "add sub mul truediv floordiv mod pow and or xor".split())
_EXPOSES = frozenset("numpy __array__ __dlpack__".split())  # hand out memory that others may write into unseen


_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # noqa: SLF001


class Kind:
    """What is known of a function before its arguments are."""

    __slots__ = (
        "backward",
        "cuts",
        "draws",
        "elastic",
        "exposes",
        "gradient",
        "inplace",
        "looks",
        "name",
        "plain",
        "shape",
        "statistics",
        "writes",
    )

    def __init__(self, func: Any) -> None:
        name, attribute = _label(func)
        self.looks = attribute in PROPERTIES or name in METADATA
        self.gradient = attribute == "grad"
        if attribute:
            name = f"set_{attribute}_" if name == "__set__" else attribute
        self.name = name
        self.backward = name == "backward"
        self.shape = name in SHAPES
        self.statistics = name in STATISTICS
        self.cuts = name in CUTS
        self.exposes = name in _EXPOSES
        self.elastic = name in _ELASTIC or name in ("__getitem__", "where")
        self.draws = name in RANDOM or isinstance(func, (OpOverload, OpOverloadPacket))  # of others nothing is known
        code = getattr(func, "__code__", None)
        self.inplace = code is not None and "inplace" in code.co_varnames[: code.co_argcount]
        dunder = name.startswith("__")
        self.writes = name == "__setitem__" or name in _IN_PLACE if dunder else name.endswith("_")
        special = self.looks or self.backward or self.statistics or self.cuts or self.exposes or self.elastic
        self.plain = not (special or self.draws or self.writes or name in ("grad", "register_hook"))

    def writes_now(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call writes into an argument, by its name and its arguments."""
        if self.writes:
            return True
        if self.statistics:
            return updates(self.name, args, kwargs)
        if kwargs and ("out" in kwargs or kwargs.get("inplace")):
            return True
        return self.inplace and any(x is True for x in args)


kind_of = functools.lru_cache(2048)(Kind)  # torch's functions; those of a script may come and go


def _label(func: Any) -> tuple[str, str]:
    """The name of a call, and of the attribute where it gets or sets one."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return name, getattr(getattr(func, "__self__", None), "__name__", name)
    return name.partition(".")[0] if type(func) is OpOverload else name, ""


def updates(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a normalisation updates its running statistics: its sixth argument says so in all of torch's variants."""
    if len(args) > 5:
        return bool(args[5])
    return bool(kwargs.get("training", kwargs.get("use_input_stats", kwargs.get("train", name == "instance_norm"))))


def may_draw(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a kind that draws does so: attention and recurrent networks do with a share to drop only."""
    if name == "scaled_dot_product_attention":
        return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
    if name in RECURRENT:
        return bool(kwargs) or any(isinstance(x, float) and x for x in args)  # the share is their only float
    return True


def unrepeatable(name: str, args: Sequence[Any]) -> bool:
    """Whether a call drops by masks that follow no generator, so that to draw them again would change the next ones."""
    return (
        name in RECURRENT
        and args[0].is_cuda
        and torch.backends.cudnn.enabled
        and any(isinstance(x, float) and x and train for x, train in itertools.pairwise(args))
    )


def elastic(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the numbers in the arguments decide the shape of the result."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
    return name in _ELASTIC or (name == "where" and len(args) == 1)


def is_flag(result: Any) -> bool:
    """Whether a result that is no tensor can be compared exactly: truth values, counts, shapes."""
    if isinstance(result, (list, tuple)):
        return all(is_flag(x) for x in result)
    return isinstance(result, int)


def autocast() -> tuple[str, torch.dtype, bool] | None:
    """The device, type and caching of the automatic casts that are on."""
    if not _any_autocast():
        return None
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    return None


def unseen(tensor: Tensor) -> str:
    """Why a tensor with a graph that no recorded call made refuses the tape."""
    maker = type(tensor.grad_fn).__name__
    return f"part of the loss was made out of sight, by {maker}: a custom autograd function or a compiled region"


def passes_on(node: Any) -> bool:
    """Whether the node of a custom function only hands copies on, forward, and the gradient as it is, backward.

    DistributedDataParallel has one behind its model where it looks for unused parameters.
    """
    function: Any = getattr(node, "_forward_cls", None)
    return getattr(function, "__module__", "") == "torch.nn.parallel.distributed" and function.__name__ == "_DDPSink"


def next_node() -> int:
    """The number that autograd gives to the next node of this thread; 0 where it does not tell."""
    tell = getattr(getattr(torch._C, "_autograd", None), "_get_sequence_nr", None)  # noqa: SLF001
    return 0 if tell is None else tell()


def made_before(node: Any, number: int) -> bool:
    """Whether a node of a graph is older than one of this number; False where that is not known."""
    tell = getattr(node, "_sequence_nr", None)
    return tell is not None and tell() < number


def caller() -> str:
    """The source line outside torch and this package that made the current call, as file:line."""
    frame = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "unstuck", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
