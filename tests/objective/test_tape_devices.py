"""A tape of another device on a machine with a CPU only: as if it came from there, by editing what was packed."""

from dataclasses import replace

import pytest
import torch
from tape_steps import record, replayed
from torch import nn
from torch.nn import functional as F

from unstuck.objective import Instruction, Recorder, TapeError, Vault, on_cpu, pack, unpack
from unstuck.objective._calls import unrepeatable


def linear(body):
    """A program whose loss is body(h), h the outputs of a layer."""

    def make():
        layer, x = nn.Linear(4, 6), torch.randn(5, 4)
        return list(layer.parameters()), lambda backward: backward(body(layer(x)))

    return make


def renamed(x, old, new):
    """Packed values with one literal in the place of another."""
    if isinstance(x, (list, tuple)):
        return type(x)(renamed(y, old, new) for y in x)
    if isinstance(x, dict):
        return {k: renamed(v, old, new) for k, v in x.items()}
    return new if type(x) is str and x == old else x


BODIES = {
    "a name": lambda h: h.to("cpu").square().mean(),
    "a name with a type": lambda h: h.to("cpu", torch.float64).square().mean(),
    "a keyword": lambda h: (torch.zeros_like(h, device="cpu") + h).square().mean(),
    "a device": lambda h: (h.to(torch.device("cpu")) * torch.ones_like(h, device=h.device)).square().mean(),
}


@pytest.mark.parametrize("there", ["cuda", "cuda:0", "cuda:3", "xpu", "mps"])
@pytest.mark.parametrize("name", BODIES)
def test_devices_that_a_step_names_become_the_cpu(name, there):
    tape, leaves, _ = record(linear(BODIES[name]))
    packed = renamed(pack([tape]), "cpu", there)
    assert packed != pack([tape])
    tapes, because = on_cpu(unpack(packed))
    loss, gradient = replayed(tapes[0], leaves)
    assert (float(loss), because) == (tape.loss, "")
    assert all(torch.equal(a, b) for a, b in zip(gradient, replayed(tape, leaves)[1], strict=True))


MOVES = {  # how a script asks for a GPU, in place of the call h.to("cpu")
    "x.cuda()": (torch.Tensor.cuda, "cuda", (), ()),
    "x.cuda(1, non_blocking=True)": (torch.Tensor.cuda, "cuda", (1,), (("non_blocking", True),)),
    "x.to(0)": (torch.Tensor.to, "to", (0,), ()),
    "x.to(device=0)": (torch.Tensor.to, "to", (), (("device", 0),)),
    "x.to(device='cuda', dtype=...)": (torch.Tensor.to, "to", (), (("device", "cuda:1"), ("dtype", torch.float32))),
    "x.type('torch.cuda.DoubleTensor')": (torch.Tensor.type, "type", ("torch.cuda.DoubleTensor",), ()),
}


@pytest.mark.parametrize("move", MOVES)
def test_calls_that_move_to_a_gpu_stay(move):
    tape, leaves, _ = record(linear(BODIES["a name"]))
    function, name, args, kwargs = MOVES[move]

    def other(call: Instruction) -> Instruction:
        if call.name != "to":
            return call
        return replace(call, function=function, name=name, args=(call.args[0], *args), kwargs=kwargs)

    program = replace(tape.program, instructions=tuple(map(other, tape.program.instructions)))
    tapes, _ = on_cpu(unpack(pack([replace(tape, program=program)])))
    assert float(replayed(tapes[0], leaves)[0]) == pytest.approx(tape.loss, rel=1e-6)


def test_letters_that_name_axes_are_no_device():
    def body(h):
        return (torch.einsum("cuda", h.view(5, 2, 3, 1)) * torch.arange(3)[:, None]).square().mean()

    tape, leaves, _ = record(linear(body))
    tapes, _ = on_cpu([tape])
    assert float(replayed(tapes[0], leaves)[0]) == tape.loss


def test_casts_of_a_gpu_are_those_of_the_cpu():
    def make():
        layer, x = nn.Linear(4, 6), torch.randn(5, 4)

        def step(backward):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                backward(F.mse_loss(layer(x).float(), torch.zeros(5, 6)))

        return list(layer.parameters()), step

    tape, leaves, _ = record(make)
    packed = renamed(pack([tape]), "cpu", "cuda")
    (there,) = unpack(packed)
    assert {call.autocast[0] for call in there.program.instructions} == {"cuda"}
    tapes, _ = on_cpu([there])
    assert float(replayed(tapes[0], leaves)[0]) == tape.loss


def masked():
    def make():
        layer, x = nn.Linear(4, 6), torch.randn(5, 4)
        return list(layer.parameters()), lambda backward: backward(F.dropout(layer(x)).square().mean())

    tape, leaves, _ = record(make)
    seed_and_offset = torch.zeros(16, dtype=torch.uint8)  # as a CUDA generator has it
    return replace(tape, states=(seed_and_offset,)), leaves


def test_masks_of_a_gpu_are_refused_where_they_cannot_be_drawn():
    there, leaves = masked()
    before = torch.get_rng_state()
    with pytest.raises(TapeError, match="another device"):
        there.replay(leaves)
    assert torch.equal(before, torch.get_rng_state())
    plain, _, _ = record(linear(BODIES["a name"]))
    tapes, because = on_cpu([there, plain, there])
    assert [t.loss for t in tapes] == [plain.loss]
    assert "random numbers" in because


def test_tapes_that_share_a_program_share_it_on_the_cpu_too():
    first, _, _ = record(linear(BODIES["a name"]))
    tapes, _ = on_cpu([first, replace(first, step=2)])
    assert tapes[0].program is tapes[1].program


class OnAGpu:
    """What is asked of the input of a recurrent network, where there is no GPU to put one on."""

    is_cuda = True


@pytest.mark.parametrize(("dropout", "train", "refused"), [(0.3, True, True), (0.3, False, False), (0.0, True, False)])
def test_only_masks_of_cudnn_are_unrepeatable(dropout, train, refused):
    args = (OnAGpu(), (), [], True, 2, dropout, train, False, True)  # as nn.LSTM calls torch's lstm
    assert unrepeatable("lstm", args) is refused
    assert not unrepeatable("dropout", args)
    assert not unrepeatable("lstm", (torch.zeros(1), *args[1:]))
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False  # torch's own kernels draw from the generator
    try:
        assert not unrepeatable("lstm", args)
    finally:
        torch.backends.cudnn.enabled = before


def test_a_recurrent_network_that_drops_is_recorded_on_the_cpu():
    net, x = nn.LSTM(3, 4, num_layers=2, dropout=0.5), torch.randn(5, 2, 3)
    recorder = Recorder(list(net.parameters()))
    with recorder:
        loss = net(x)[0].square().mean()
        recorder.root([loss])
    assert float(recorder.finish(Vault()).replay(list(net.parameters())).detach()) == float(loss.detach())
