"""The tape is the step: it gives the recorded loss and gradient, and those of the script at other weights."""

import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from tape_programs import PROGRAMS
from tape_steps import assert_same, build, gradients, record, replayed, rooted, run, small
from torch import nn
from torch.overrides import get_overridable_functions

from unstuck.objective import Recorder, TapeError, Vault, pack, second_order, unpack
from unstuck.objective._calls import RANDOM

# Where the replay takes another kernel than the script, because torch's has no (or wrong) second derivatives.
OTHER_KERNEL = {"weight_norm_and_gradient_checkpoints"}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only lose by sharing the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PROGRAMS)
def test_recording_changes_nothing(name):
    plain, step = build(PROGRAMS[name])
    losses = run(step)
    state = torch.get_rng_state()
    _, leaves, watched = record(PROGRAMS[name])
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip([*losses, *gradients(plain)], [*watched, *gradients(leaves)], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_replay_gives_the_recorded_loss_and_gradient(name):
    tape, leaves, losses = record(PROGRAMS[name])
    loss, grads = replayed(tape, leaves)
    assert tape.loss == float(sum(losses))
    if name in OTHER_KERNEL:
        assert abs(float(loss) - tape.loss) <= 1e-6 * abs(tape.loss)
    else:
        assert float(loss) == tape.loss
    assert_same(grads, gradients(leaves), rtol=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_replay_at_other_weights_is_the_script_at_other_weights(name):
    tape, _, _ = record(PROGRAMS[name])
    there, step = build(PROGRAMS[name], nudge=0.05)
    weights = [p.detach().clone().requires_grad_(p.requires_grad) for p in there]
    losses = run(step)
    loss, grads = replayed(tape, weights)
    torch.testing.assert_close(loss.double(), sum(losses).double(), rtol=1e-6, atol=0)
    assert_same(grads, gradients(there), rtol=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_tape_read_back_from_disk_is_the_same_tape(name):
    tape, leaves, _ = record(PROGRAMS[name])
    file = io.BytesIO()
    torch.save(pack([tape]), file)
    file.seek(0)
    (back,) = unpack(torch.load(file, weights_only=True))
    assert (back.loss, back.program) == (tape.loss, tape.program)
    ours, theirs = replayed(back, leaves), replayed(tape, leaves)
    assert torch.equal(ours[0], theirs[0])
    assert_same(ours[1], theirs[1], rtol=0)


def test_activations_that_torch_does_not_list_can_be_written():
    """They have no second derivatives, either."""
    x, a = torch.randn(6, 3), nn.Linear(3, 5)

    def step(backward):
        backward((nn.functional.hardswish(a(x)) * nn.functional.hardsigmoid(a(x))).sum())

    tape, leaves, _ = record(lambda: (list(a.parameters()), step))
    (back,) = unpack(pack([tape]))
    assert torch.equal(replayed(back, leaves)[0], replayed(tape, leaves)[0])


# Their gradients are not those of a function of the weights: what was cut out of the graph moves with the weights too.
CUT = {"batch_norm_trained_then_evaluated", "codebook_moved_through_data", "statistics_by_hand"}
CUT |= {"targets_without_gradients"}


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - CUT - {"autocast_bfloat16"}))
def test_hessian_products_agree_with_differences_of_gradients(name):
    torch.set_default_dtype(torch.float64)
    try:
        tape, leaves, _ = record(PROGRAMS[name])
        g = torch.Generator().manual_seed(5)
        v = [torch.randn(p.shape, generator=g) if p.requires_grad else torch.zeros(p.shape) for p in leaves]
        theta = [p.detach().clone().requires_grad_() for p in leaves]
        with second_order(tape):
            first = torch.autograd.grad(tape.replay(theta), theta, create_graph=True, allow_unused=True)
        slope = sum((a * b).sum() for a, b in zip(first, v, strict=True) if a is not None)
        product = torch.autograd.grad(slope, theta, allow_unused=True, materialize_grads=True)
        h = 1e-5

        def gradient(sign):
            there = [(p + sign * h * d).detach().requires_grad_() for p, d in zip(leaves, v, strict=True)]
            return torch.autograd.grad(tape.replay(there), there, allow_unused=True, materialize_grads=True)

        for p, up, down in zip(product, gradient(1), gradient(-1), strict=True):
            torch.testing.assert_close(p.to_dense(), (up - down).to_dense() / (2 * h), rtol=1e-6, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class DoubledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


@pytest.mark.parametrize(
    ("reason", "body"),
    [
        ("DoubledBackward", lambda f, x: Doubled.apply(f(x)).sum()),
        ("DoubledBackward", lambda f, x: Doubled.apply(f(x).sum())),
        ("DoubledBackward", lambda f, x: (Doubled.apply(f(x)) + f(x)).sum()),
        ("DoubledInPlaceBackward", lambda f, x: DoubledInPlace.apply(f(x)).sum()),
        ("DoubledInPlaceBackward", lambda f, x: (DoubledInPlace.apply(h := f(x)), h.sum())[1]),
        (
            "CheckpointFunction",
            lambda f, x: torch.utils.checkpoint.checkpoint(f, x.requires_grad_(), use_reentrant=True).sum(),
        ),
        ("reads a number back", lambda f, x: f(x).sum() * f(x).std().item()),
        ("reads a number back", lambda f, x: f(f(x) * float(f(x).detach().abs().max())).sum()),
        ("reads a number back", lambda f, x: f(torch.tensor(f(x).tolist())).sum()),
        ("reads a number back", lambda f, x: (f(x) * torch.from_numpy(f(x).detach().numpy())).sum()),
        (
            "generator of the script's own",
            lambda f, x: F.gumbel_softmax(f(x).bernoulli(0.5, generator=torch.Generator())).sum(),
        ),
        ("derivative", lambda f, x: torch.autograd.grad(f(x).sum(), f.weight, create_graph=True)[0].sum() + f(x).sum()),
        ("hook", lambda f, x: ((h := f(x)).register_hook(lambda g: 2 * g), h.sum())[1]),
        ("exchanged", lambda f, x: (setattr(h := f(x), "data", x), h.sum())[1]),
        ("changed in place", lambda f, x: f(x).sum() + (f.weight.data.mul_(0.5), f(x).sum())[1]),
        ("not a scalar", lambda f, x: f(x)),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_the_reason(reason, body):
    recorder, _ = rooted(body)
    with pytest.raises(TapeError, match=reason):
        recorder.finish(Vault())


def test_a_stored_gradient_in_the_loss_is_refused():
    layer, x = small()
    layer.weight.grad = torch.ones(3, 3)
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        recorder.root([layer(x).sum() + (layer.weight * layer.weight.grad).sum()])
    with pytest.raises(TapeError, match="stored gradient"):
        recorder.finish(Vault())


def test_a_compiled_region_computes_what_it_did_and_is_recorded_right_or_not_at_all():
    """The compiler may look into the recorder itself, which then gives up; the step must not notice."""
    layer, x = small()
    compiled = torch.compile(lambda z: layer(z).tanh(), backend="eager")
    recorder = Recorder(list(layer.parameters()))
    try:
        with recorder:
            loss = compiled(x).sum()
            recorder.root([loss])
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(loss, layer(x).tanh().sum())
    try:
        tape = recorder.finish(Vault())
    except TapeError:
        return
    assert float(tape.replay(list(layer.parameters())).detach()) == float(loss.detach())


def test_a_flag_replays_while_the_answer_is_the_same():
    def body(layer, x):
        return layer(x).sum() if layer.bias.sum() > 0 else layer(x).square().sum()

    recorder, layer = rooted(body)
    tape = recorder.finish(Vault())
    weight, bias, x = layer.weight.detach(), layer.bias.detach(), small()[1]
    assert bias.sum() < 0
    assert float(tape.replay([weight, bias - 1])) == float(F.linear(x, weight, bias - 1).square().sum())
    with pytest.raises(TapeError, match="another path"):
        tape.replay([weight, bias + 10])


def test_a_count_that_depends_on_the_weights_replays_while_it_is_the_same():
    recorder, layer = rooted(lambda f, x: f(x)[f(x) > 0].sum() / len(f(x)[f(x) > 0]))
    tape = recorder.finish(Vault())
    x = small()[1]
    h = layer(x).detach()
    assert float(tape.replay([2 * layer.weight, 2 * layer.bias]).detach()) == float(2 * h[h > 0].mean())
    with pytest.raises(TapeError, match="another path"):
        tape.replay([layer.weight, layer.bias + 100])


def test_a_count_taken_without_gradients_steers_too():
    def body(layer, x):
        with torch.no_grad():
            share = len(layer(x)[layer(x) > 0]) / 15
        return layer(x).sum() * share

    recorder, layer = rooted(body)
    tape = recorder.finish(Vault())
    assert float(tape.replay([2 * layer.weight, 2 * layer.bias]).detach()) == 2 * tape.loss
    with pytest.raises(TapeError, match="another path"):
        tape.replay([layer.weight, layer.bias + 100])


def test_a_number_of_the_step_before_is_for_the_log():
    layer, x = small()
    before = layer(x).mean()
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        h = layer(x)
        assert before.item() != 0
        recorder.root([h.sum()])
    recorder.finish(Vault())
    assert recorder.cuts == []


def test_a_large_batch_that_is_overwritten_after_the_step_is_noticed():
    layer, x = nn.Linear(3, 1), torch.randn(3_000_000, 3)
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        recorder.root([layer(x).mean()])
    tape = recorder.finish(Vault())
    tape.replay(list(layer.parameters()))
    x[0] = 0
    with pytest.raises(TapeError, match="overwritten in place after"):
        tape.replay(list(layer.parameters()))


def test_a_batch_that_is_overwritten_before_the_step_ends_is_noticed():
    layer, x = nn.Linear(3, 1), torch.randn(3_000_000, 3)
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        recorder.root([layer(x).mean()])
        x.data[0] = 0  # torch does not count what goes through .data
    with pytest.raises(TapeError, match="overwritten in place before"):
        recorder.finish(Vault())


def test_a_weighted_backward_is_refused():
    layer, x = small()
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        loss = layer(x).sum()
        recorder.root([loss])
        loss.backward(torch.tensor(2.0))
    with pytest.raises(TapeError, match="weights"):
        recorder.finish(Vault())


def test_a_replay_leaves_the_model_its_gradients_and_the_generator_alone():
    torch.manual_seed(0)
    leaves, step = PROGRAMS["mlp_with_batch_norm_and_dropout"]()
    model = step.__closure__[0].cell_contents
    assert isinstance(model, nn.Module)
    recorder = Recorder(leaves)
    run(step, recorder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads, state = [g.clone() for g in gradients(leaves)], torch.get_rng_state()
    replayed(recorder.finish(Vault()), leaves)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(grads, gradients(leaves), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_the_replay_is_the_same_under_the_modes_of_its_caller():
    tape, leaves, _ = record(PROGRAMS["mlp_with_batch_norm_and_dropout"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(tape.replay(leaves)) == tape.loss


def test_the_tape_keeps_the_batch_and_not_the_activations():
    layer, x = nn.Linear(3, 1000), torch.randn(5, 3)
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        h = layer(x)
        for _ in range(20):
            h = h.tanh()
        seen = weakref.ref(h)
        loss = h.mean()
        recorder.root([loss])
        loss.backward()
        del h, loss
        assert seen() is None  # as soon as backward() has freed the graph
    assert recorder.finish(Vault()).bytes == x.numel() * 4


def test_an_evaluation_within_the_step_leaves_nothing_behind():
    layer, x = small()
    recorder, batches = Recorder(list(layer.parameters())), []
    with recorder:
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                for _ in range(30):
                    batch = torch.randn(5, 3)
                    batches.append(weakref.ref(batch))
                    F.relu(layer(batch), inplace=True).sum()
        recorder.root([layer(x).sum()])
        assert sum(b() is not None for b in batches) <= 34  # of written memories, the last few are looked through late
    assert recorder.finish(Vault()).bytes == x.numel() * 4


def test_a_recorder_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        recorder, _ = rooted(lambda f, x: f(F.relu(f(x), inplace=True)).sum())
        vault = Vault()
        tape = recorder.finish(vault)
        gone = weakref.ref(recorder), weakref.ref(tape), weakref.ref(vault)
        del recorder, tape, vault
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()


def test_a_data_set_that_every_step_uses_is_copied_once():
    layer, x = small()
    vault, tapes = Vault(), []
    for _ in range(2):
        recorder = Recorder(list(layer.parameters()))
        with recorder:
            recorder.root([layer(x).sum()])
        tapes.append(recorder.finish(vault, like=[t.program for t in tapes[:1]]))
    assert tapes[0].constants[0] is tapes[1].constants[0]
    assert tapes[0].program is tapes[1].program
    x.add_(1)
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        recorder.root([layer(x).sum()])
    assert recorder.finish(vault).constants[0] is not tapes[0].constants[0]


def test_a_file_that_names_another_function_is_refused():
    recorder, _ = rooted(lambda f, x: f(x).sum())
    data = pack([recorder.finish(Vault())])
    for name in ("os.system", "torch.load", "torch.hub.load", "torch.from_file", "builtins.eval"):
        data["programs"][0]["calls"][0][0] = name
        with pytest.raises(TapeError, match=name):
            unpack(data)


def test_every_seeded_operator_of_torch_is_known_to_draw():
    """torch tags its own random operators: another source than our list of names."""
    seeded = set()
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            if torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags:
                seeded.add(name)
    visible = {getattr(f, "__name__", "") for group in get_overridable_functions().values() for f in group}
    assert seeded & visible - RANDOM == set()
