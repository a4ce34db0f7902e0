"""Random programs: a tape is right at the recorded weights and at others, or it refuses. It is never wrong."""

import random
import re

import pytest
import torch
import torch.nn.functional as F

from unstuck.objective import Recorder, TapeError, Vault

# a, b: tensors (4, 6) of the program; c: a constant (4, 6); v: a view of anything; s: a scalar; k: a number; i: 0..3
EXPRESSIONS = """
{a} + {b}; {a} - {k} * {b}; {a} * {b}; {a} / (1 + {b}.abs()); {a} @ W; F.linear({a}, W, w); {a} + w; {a} * V; -{a}
{a}.tanh(); {a}.sigmoid(); F.relu({a}); F.gelu({a}); F.softplus({a}); F.leaky_relu({a}, 0.2); {a}.exp().clamp(max=3.0)
({a} * {a} + 1).sqrt(); ({a}.abs() + 1).log(); {a}.abs(); {a}.sin(); {a}.clamp(-1, 1); {a}.softmax(1)
{a}.log_softmax(0)
torch.where({a} > {b}, {a}, {b}); torch.where(M, {a}, {b}); torch.maximum({a}, {b}); torch.lerp({a}, {b}, {k})
{a}.cumsum(1); {a}.flip(0); {a}.roll(1, 1); {a}.sort(1).values; {a}.sort(1)[0]; {a}[[3, 1, 0, 2]]; {a}[I]
{a}.detach() + {b}
{a}.t().reshape(4, 6); {a}.view(6, 4).t().contiguous(); {a}.reshape(2, 12).reshape(4, 6); {a}.view(-1)[:24].view(4, 6)
torch.cat([{a}[:2], {b}[2:]]); torch.stack(list({a}.unbind(0))); torch.cat({a}.split(2, dim=1)[::-1], 1)
torch.cat(list({a}.chunk(3, 1)), 1); {a}.gather(1, J); {a}.index_select(0, I); torch.einsum("ij,jk->ik", {a}, W)
{a}.masked_fill({b} > 0, {k}); {a}.masked_fill(M, 0.5); {a}.clone(); {a}.contiguous(); {a}.to(torch.float64).float()
F.dropout({a}, 0.3); F.dropout({a}, 0.3, training=False); F.layer_norm({a}, (6,), w); {a} + torch.randn_like({a})
F.batch_norm({a}, R, S, w, None, True); F.batch_norm({a}, running_mean=R, running_var=S, training=True)
F.batch_norm({a}, {c}[0], S + 1); torch.rand(4, 6) * {a}; {a}.mean(0, keepdim=True).expand(4, 6)
{a}.max(1, keepdim=True)[0] + {b}
{a}.amax(0) * {b}; {a}.norm(dim=1, keepdim=True) * {c}; {a} * {s}; {a}.sum() * {c}; {c} * V; {c}.clone()
{a}.data * {b}
{a}.topk(3).values.repeat(1, 2); torch.zeros_like({a}); torch.outer({a}[:, 0], w); ({a}.unsqueeze(1) * V).sum(1)[:4]
torch.bernoulli(torch.sigmoid({a}.detach())) * {b}; F.one_hot({a}.argmax(1), 6) * {b}; F.pad({a}[:, 1:], (0, 1))
torch.zeros(4, 6); {a}.new_ones(4, 6) * {s}; torch.tensor({i}.0) * {a}; {a}.movedim(0, 1).reshape(4, 6)
{a}.nan_to_num()
torch.addmm({a}, {b}, W); ({a}.T @ {b}).T[:4, :6]; {a}.square() / 5; F.embedding(I, {a}); {a}.relu().mul({k})
{a}.type(torch.float)
torch.stack([x * {k} for x in {a}]); {a}.index_add(0, I, {b}); {a}.scatter(1, J, {b})
{a}.diff(dim=1, prepend={b}[:, :1])
torch.atleast_2d({a}, {b})[1]; torch.broadcast_tensors({a}, {s})[1]; {a}.unfold(1, 6, 1).squeeze(1)
{a}.clone().fill_({k})
F.softmax({a}, dim=-1, dtype=torch.float64).float(); {a}.float_power(2).float().clamp(max=9); {a}.view_as({b})
{a}.requires_grad_()
torch.from_numpy(M.numpy()) * {a}
F.batch_norm({a}, R, S, w, None, False); F.batch_norm({a}, R, S + 0.5); torch.from_numpy(N) * {a}; {a} * E
{a}.detach().numpy().sum() * {b}; {a} + torch.as_tensor(N); F.linear(E, W) + {a}; torch.from_numpy({c}.numpy()) @ W
"""
STATEMENTS = """
{a} += {b}; {a} *= {k}; {a}.add_({b}); {a}.mul_({s}.detach()); {a}.tanh_(); {a}.zero_(); F.relu({a}, inplace=True)
F.relu_({a})
{a}[{i}] = {b}[0]; {a}[:, {i}] = {k}; {a}[M] = {k}; {a}[M] = {b}[M]; {a}[{a} > 0.5] = 0.1; {a}[{i}] += {b}[1]
{a}.t()[2] *= 2
{a}[{i}].zero_(); {a}[{i}].copy_({b}[2]); {a}.view(-1)[3:9].add_({k}); {a}.copy_({b}); {a}.clamp_(-2, 2)
{a}.data.mul_(0.5)
{v}.mul_(0.5); {v}.zero_(); {v}.add_({s}); {v}.copy_({v}.detach() + {s}); {v}[0] = {s}; {v}[0] += 1; {v}.data[0] = 1.5
{c}.add_({b}.detach()); {c}.mul_(0.5); {c}[{i}] = {k}; {c}[{i}] = {b}[0].detach()
R.mul_(0.5); R.lerp_({a}.detach().mean(0), 0.1); {a}.masked_fill_(M, {k}); {a}.index_fill_(0, I, {k})
F.dropout({a}, 0.2, True, True)
{a}.detach().mul_(0.5); {a}.normal_(); {a}.uniform_(); {a}.bernoulli_(0.5); {a}.swapaxes_(0, 0)
{a}.exponential_().clamp_(max=2)
{a}.sub_(w); {a}.scatter_(1, J, {b}); {a}.index_copy_(0, I, {b}); {a}.put_(torch.tensor([1]), {s}.reshape(1))
{a}[0, 1:3] = {b}[3, :2]
N[{i}] = {k}; N *= 0.5; {c}.numpy()[{i}] = {k}; {c}.numpy().sum(); {a}.detach().numpy()[{i}] = {k}
{v}.detach().numpy()[...] = 0.1; {a}.detach().numpy().sum(); {c}.data.mul_({k}); {c}.data[{i}] = {k}
F.relu({c}.data, True); V.detach().numpy()[0] *= 0.5; A.mul_(0.5)
"""
SCALARS = """
{a}.mean(); {a}.sum() / 9; {a}.max(); {a}[1, 2]; {a}.std(); {a}.norm(); ({a} * {b}).sum() / 5; {v}.mean()
{v}.sum() / 7; {v}[0].sum()
{a}[{a} > 0].sum(); {a}[{a} > 0].sum() / ({a} > 0).sum(); {a}[{a} > 0].sum() / (1 + len({a}[{a} > 0]))
F.mse_loss({a}, {b})
F.cross_entropy({a}, I); {a}.masked_select(M).mean(); torch.logsumexp({a}, 1).mean(); {a}.topk(2)[0].mean()
{a}.prod(1).tanh().mean()
{a}.nonzero().shape[0] * {s}; {s} * {k}; {s} + {s}; {s}.detach() * {s}; torch.tensor([{i}.5])[0] * {s}
{a}.unique().numel() * {s}
{a}.abs().amin(); {c}.sum() * {s}; R.sum() * {s}; {a}.argmax().float() * {s}; torch.dist({a}, {b})
sum(x.sum() for x in {a}) / 9
"""
VIEWS = """
{a}[{i}]; {a}.view(-1); {a}.t(); {a}[:, 1:4]; {a}.detach(); {a}.data; {a}.unsqueeze(0); {c}[{i}]; {c}.view(-1)[2:]
{c}.t(); {v}[0:]
{a}.unbind(0)[{i}]; {a}.chunk(2)[1]; {c}.detach(); {a}.reshape(6, 4); {a}.expand(4, 6); R[1:]; {a}.diagonal(); {a}.T
"""
BRANCHES = """
if {a}.sum() > 0: | if {a}.mean() < {b}.mean(): | if ({a} > 0).sum().item() > 11: | if bool({s} > {k}): |
if {a}.argmax().item() % 2: |
if {s}.item() > 0: | if torch.equal({a}, {b}): | if float({s}.detach()) < {k}: | if {a}[{a} > 0].shape[0] > 10: |
if {c}.sum() > 0: |
if {a}.detach().numpy().sum() > 0: | if {a}.tolist()[0][0] > 0: | if torch.rand(()) > 0.5: |
if len({a}.nonzero()) > 9: |
for j in range(2): | with torch.no_grad(): | with torch.no_grad(): | with torch.enable_grad(): | if True: |
"""


def choices(text, mark=";"):
    return [t.strip() for t in text.replace("\n", mark).split(mark) if t.strip()]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only lose by sharing the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Writer:
    """Writes one random program as text."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.tensors, self.views, self.scalars = ["V"], ["V[1]"], ["w[2]"]

    def fill(self, text):
        while "{" in text:
            start = text.index("{")
            text = text[:start] + self.pick(text[start + 1]) + text[start + 3 :]
        return text

    def pick(self, kind):
        d = self.dice
        pools = {"a": self.tensors, "b": self.tensors, "v": self.views, "s": self.scalars, "c": ["C", "D", "E"]}
        if kind in pools:
            return d.choice(pools[kind][-5:])
        return str(d.randrange(4)) if kind == "i" else str(d.choice([0.3, 0.7, 1.3, -0.4]))

    def line(self):
        d, roll = self.dice, self.dice.random()
        if roll < 0.45 or len(self.tensors) == 1:
            text = f"t{len(self.tensors)} = {self.fill(d.choice(EXPRESSIONS_))}"
            self.tensors.append(text.split(" ")[0])
        elif roll < 0.65:
            text = self.fill(d.choice(STATEMENTS_))
            if text.startswith("V"):
                text = "pass"
        elif roll < 0.8:
            text = f"s{len(self.scalars)} = {self.fill(d.choice(SCALARS_))}"
            self.scalars.append(text.split(" ")[0])
        else:
            text = f"v{len(self.views)} = {self.fill(d.choice(VIEWS_))}"
            self.views.append(text.split(" ")[0])
        return text

    def block(self):
        if self.dice.random() > 0.2:
            return [self.line()]
        head = self.fill(self.dice.choice(BRANCHES_))
        while self.parts > 1 and any(read in head for read in ("item", "numpy", "tolist", "float(")):
            head = self.fill(self.dice.choice(BRANCHES_))  # after a backward() such numbers are taken to be for the log
        known = [list(x) for x in (self.tensors, self.views, self.scalars)]
        body = ["    " + self.line() for _ in range(2)]
        if head.startswith("if"):  # what only a branch defines is not used after it, except by its older name
            names = [b.strip().split(" = ")[0] for b in body if b.strip()[0] in "tsv" and " = " in b]
            self.tensors, self.views, self.scalars = known
            body += [f"    t1 = {n}" for n in names if n[0] == "t" and n[1:].isdigit() and len(known[0]) > 1]
        return [head, *body]

    def program(self):
        lines = []
        self.parts = self.dice.choice([1, 1, 1, 2])
        for part in range(self.parts):
            for _ in range(self.dice.randrange(3, 14)):
                lines += self.block()
            ends = self.dice.sample(self.tensors, min(3, len(self.tensors)))
            ends = [f"({t} ** 2).mean()" for t in ends] + self.dice.sample(self.scalars, min(2, len(self.scalars)))
            lines += [f"loss{part} = " + " + ".join(ends), f"backward(loss{part})"]
        return "\n".join(lines)


EXPRESSIONS_, STATEMENTS_, SCALARS_, VIEWS_ = (choices(t) for t in (EXPRESSIONS, STATEMENTS, SCALARS, VIEWS))
BRANCHES_ = choices(BRANCHES, "|")


def weights(nudge):
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(s, generator=g) / 2 for s in ((4, 6), (6, 6), (6,))]
    g.manual_seed(2)
    return [torch.nn.Parameter(p + nudge * torch.randn(p.shape, generator=g)) for p in made]


def execute(code, leaves, recorder=None):
    """Runs the program; its losses, summed."""
    g = torch.Generator().manual_seed(3)
    space = {n: torch.randn(4, 6, generator=g) for n in "CDE"}
    space |= {"M": torch.rand(4, 6, generator=g) > 0.5, "I": torch.tensor([2, 0, 3, 1]), "R": torch.zeros(6)}
    space |= {"J": torch.randint(0, 6, (4, 6), generator=g), "S": torch.ones(6), "torch": torch, "F": F}
    space |= dict(zip("VWw", leaves, strict=True))
    space["N"] = space["D"].numpy().copy()
    space |= {"E": torch.from_numpy(space["N"]), "A": space["C"].data}  # memory with two owners
    losses = []

    def backward(loss):
        if recorder is not None:
            recorder.root([loss])
        losses.append(loss.detach().clone().reshape(()))
        loss.backward(retain_graph=True)

    space["backward"] = backward
    torch.manual_seed(4)
    if recorder is None:
        exec(code, space)
    else:
        with recorder:
            exec(code, space)
    return float(sum(losses)), torch.get_rng_state()


def grads(leaves):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]


def agree(a, b):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-4, equal_nan=True)


def check(seed, functions=None):
    """'broken' where the program itself fails, 'refused', or 'right'; AssertionError where the tape is wrong.

    `functions` gathers what the right tapes call.
    """
    end, program = judged(Writer(seed).program())
    if functions is not None and program is not None:
        functions.update(call.name for call in program.instructions)
    return end


def check_moved(seed):
    """As `check`, for the program with other numbers beside its tape with the first; 'shared' where only these move."""
    text = Writer(seed).program()
    leaves = weights(0)
    recorder = Recorder(leaves)
    try:
        execute(compile(text, f"<program {seed}>", "exec"), leaves, recorder)
        known = recorder.finish(Vault()).program
    except (RuntimeError, IndexError, NameError, TypeError):
        return "refused"
    moved = re.sub(r"(?<![\w.])(0\.3|0\.7|1\.3|0\.4|0\.5)(?!\d)", lambda number: str(float(number[0]) + 0.125), text)
    end, program = judged(moved, like=[known])
    return "shared" if program is not None and program.moves else end


def judged(text, *, like=()):
    """How a program ends, and that of its tape where it is right."""
    code = compile(text, "<program>", "exec")
    plain = weights(0)
    try:
        loss, state = execute(code, plain)
    except (RuntimeError, IndexError, NameError, TypeError):
        return "broken", None
    leaves = weights(0)
    recorder = Recorder(leaves)
    watched, watched_state = execute(code, leaves, recorder)
    assert agree(loss, watched) and torch.equal(state, watched_state), text
    assert all(torch.equal(a, b) or agree(a, b) for a, b in zip(grads(plain), grads(leaves), strict=True)), text
    try:
        tape = recorder.finish(Vault(), like=like)
    except TapeError as error:
        assert "could not be recorded" not in str(error) or "view" in str(error), f"{error}\n{text}"
        return "refused", None
    # A tape is a function of the weights as the step leaves them: it may write into them before it uses them. Where the
    # recorded path does not, a branch that other weights take may, afterwards.
    writes = any(not torch.equal(p, q) for p, q in zip(leaves, weights(0), strict=True))
    for nudge in (0, 0.02, 0.3):
        script = weights(nudge)
        before = [p.detach().clone() for p in script]
        try:
            expected = execute(code, script)[0]
        except (RuntimeError, IndexError, NameError, TypeError):
            continue
        values = [p.detach().clone().requires_grad_() for p in (script if writes else before)]
        try:
            found = tape.replay(values)
        except TapeError:
            assert nudge > 0, text
            continue
        assert agree(found.detach(), expected), f"loss {float(found)} for {expected} at {nudge}\n{text}"
        try:
            ours = torch.autograd.grad(found, values, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:  # a value is written into after the first of several backward() calls used it
            assert "modified by an inplace operation" in str(error) and text.count("backward(") > 1, text
            return "refused", None
        assert all(map(agree, ours, grads(script))), f"gradient at {nudge}\n{text}"
    return "right", tape.program


def survey(seeds, functions=None):
    ends = [check(seed, functions) for seed in seeds]
    return {end: ends.count(end) for end in ("right", "refused", "broken")}


@pytest.mark.filterwarnings("ignore")  # the programs do what torch warns of
def test_random_programs_replay_right_or_not_at_all():
    functions = set()
    ends = survey(range(300), functions)
    assert ends["right"] > 100, ends
    assert len(functions) >= 80, sorted(functions)


@pytest.mark.filterwarnings("ignore")
def test_random_programs_with_numbers_that_move_replay_right_or_not_at_all():
    ends = [check_moved(seed) for seed in range(300, 420)]
    assert ends.count("shared") > 20, ends


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_random_programs_replay_right_or_not_at_all():
    assert survey(range(1000, 2000))["right"] > 350
