"""Lanczos against spectra that are known, and its own claims about errors against the truth."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unstuck.curvature import Krylov, Operator, dense, eigenpairs, hessian
from unstuck.objective._objective import Objective


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def diagonal(values, dtype=torch.float64):
    entries = torch.as_tensor(values, dtype=dtype)
    return Operator(lambda v: entries * v, len(entries), dtype=dtype)


SMALL = [
    [3.0],
    [0.0, 0.0, 0.0, 0.0],
    [1.0] * 6,
    [2.0, -2.0],
    [4.0, 4.0, 4.0, 1.0, 1.0, -2.0],
    [-5.0, -5.0, -5.0, -5.0, 1.0],
    [1e-9, 0.0, 5.0],
    [7.0] + [0.0] * 40,
    [3.0, 3.0, 2.0] + [0.0] * 60 + [-1.0, -1.0],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", SMALL, ids=str)
def test_small_and_degenerate_spectra_are_exact_with_every_copy(values, dtype):
    true = torch.tensor(sorted(values), dtype=dtype)
    for largest, smallest in [(1, 1), (3, 2), (0, 1), (2, 0)]:
        found = eigenpairs(diagonal(values, dtype), largest=largest, smallest=smallest, generator=seeded())
        smallest = min(smallest, len(true))
        largest = min(largest, len(true) - smallest)
        wanted = torch.cat([true[:smallest], true[len(true) - largest :]])
        rounding = 100 * torch.finfo(dtype).eps * float(true.abs().max())
        torch.testing.assert_close(found.values, wanted, rtol=0, atol=rounding)
        assert found.converged
        gram = found.vectors @ found.vectors.T
        torch.testing.assert_close(gram, torch.eye(len(wanted), dtype=dtype), rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_a_closed_krylov_space_ends_the_search():
    low_rank = diagonal([7.0, 5.0] + [0.0] * 998)
    assert eigenpairs(low_rank, largest=1, smallest=1, generator=seeded()).products == 3


def outliers(g):
    bulk = torch.randn(1000, generator=g, dtype=torch.float64).abs() * 0.3
    return torch.cat([torch.tensor([44.0, 24, 20, 17, 16, 14, -2.6]), bulk])


def crowded(g):
    bulk = torch.randn(1000, generator=g, dtype=torch.float64) * 0.05
    return torch.cat([torch.tensor([4, 3.98, 2, 1.99, 1.5, 1.49, 1.3, -0.3]), bulk])


def decaying(g):
    return torch.arange(1, 1001) ** -1.0 * torch.randn(1000, generator=g, dtype=torch.float64).sign()


def wigner(g):
    matrix = torch.randn(300, 300, generator=g, dtype=torch.float64)
    return torch.linalg.eigvalsh(matrix + matrix.T)


def test_the_claimed_errors_hold_and_wanted_eigenvalues_are_rarely_passed_over():
    passed_over = []
    for spectrum in (outliers, crowded, decaying, wigner):
        for seed in range(20):
            true = spectrum(seeded(seed)).sort().values
            found = eigenpairs(diagonal(true), largest=5, smallest=1, tol=1e-3, generator=seeded(seed))
            assert found.converged
            assert found.missed <= 0.1
            assert (found.errors <= 1e-3 * found.scale).all()
            misses = (found.vectors * true - found.values[:, None] * found.vectors).norm(dim=1)
            assert (misses <= found.residuals * 1.001).all()
            nearest = (found.values[:, None] - true).abs().amin(1)
            assert (nearest <= 1.1 * found.errors).all()  # the gap is an estimate too
            if ((found.values - torch.cat([true[:1], true[-5:]])).abs() > 1e-3 * found.scale).any():
                passed_over.append((spectrum.__name__, seed))
    # a start may hold next to nothing of a wanted vector; a rule that sees the criterion once fails for some fifteen
    assert len(passed_over) <= 1, passed_over


@pytest.mark.parametrize("spectrum", [outliers, crowded, decaying, wigner])
def test_what_the_start_holds_of_an_eigenvector_is_never_more_than_the_products_allow(spectrum):
    true = spectrum(seeded())
    krylov = Krylov(diagonal(true), rows=40, generator=seeded(1))
    held, spread = krylov.next.abs(), 1 / math.sqrt(len(true))  # of each eigenvector
    for _ in range(40):
        krylov.grow()
        odds = krylov.hidden(krylov.ritz(), true, spread)
        known = odds < 1 - 1e-9
        most = torch.erfinv(odds) * math.sqrt(2) * spread
        assert (held <= most * (1 + 1e-6) + 1e-9)[known].all()
    assert float(krylov.hidden(krylov.ritz(), true.max()[None] * 1.5, spread)) < 1e-9  # and next to nothing far out


def test_the_basis_stays_orthogonal_over_hundreds_of_products():
    # without reorthogonalisation the converged value 100 comes back as ghosts after some 30 products
    true = torch.cat([torch.linspace(0, 1, 2000), torch.tensor([100.0])])
    found = eigenpairs(
        diagonal(true, torch.float32), largest=3, smallest=1, tol=1e-5, max_products=200, generator=seeded()
    )
    torch.testing.assert_close(found.values[1:], torch.tensor([1 - 1 / 1999, 1, 100]), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(4), rtol=0, atol=2e-6)


def test_a_run_that_is_cut_off_says_so():
    found = eigenpairs(diagonal(torch.linspace(-1, 1, 500)), tol=1e-6, max_products=10, generator=seeded())
    assert not found.converged
    assert found.products == 10
    assert (found.errors > 1e-6).all()
    assert (found.values - torch.tensor([-1.0, 1.0])).abs().le(found.errors).all()


def test_the_ends_of_a_network_hessian_are_those_of_the_dense_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5))
    x, y = torch.randn(40, 8), torch.arange(40) % 5

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def dense_loss(flat: Tensor) -> Tensor:
        a, b, c, d = flat.split([96, 12, 60, 5])
        h = torch.tanh(x.double() @ a.view(12, 8).T + b) @ c.view(5, 12).T + d
        return nn.functional.cross_entropy(h, y)

    objective = Objective(model, loss, list(zip(x.split(33), y.split(33), strict=True)))
    true = torch.linalg.eigvalsh(torch.autograd.functional.hessian(dense_loss, objective.point.double()))
    H = hessian(objective)
    found = eigenpairs(H, largest=5, smallest=2, generator=seeded())
    wanted = torch.cat([true[:2], true[-5:]])
    assert found.converged
    assert ((found.values - wanted).abs() <= found.errors).all()
    assert found.products < objective.size / 2
    torch.testing.assert_close(torch.linalg.eigvalsh(dense(H)).double(), true, rtol=0, atol=1e-5 * float(true[-1]))


def test_the_same_generator_gives_the_same_pairs_and_the_global_one_is_not_asked():
    before = torch.get_rng_state()
    pairs = [eigenpairs(diagonal(torch.linspace(-1, 1, 90)), generator=seeded(3)) for _ in range(2)]
    assert torch.equal(pairs[0].vectors, pairs[1].vectors)
    assert torch.equal(torch.get_rng_state(), before)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite products, got nan in product 1"):
        eigenpairs(Operator(lambda v: v * float("nan"), 10), generator=seeded())


def test_wishes_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match="largest=0, smallest=0"):
        eigenpairs(diagonal([1.0, 2.0]), largest=0, smallest=0)
    with pytest.raises(ValueError, match="largest=-1"):
        eigenpairs(diagonal([1.0, 2.0]), largest=-1)
    with pytest.raises(ValueError, match="got max_products=3: raise it"):
        eigenpairs(diagonal(torch.ones(10)), largest=5, max_products=3)
    for tol in (0.0, -1e-3, math.nan, 1.0):
        with pytest.raises(ValueError, match=f"between 0 and 1, got tol={tol}"):
            eigenpairs(diagonal([1.0, 2.0]), tol=tol)


def test_a_basis_of_bounded_memory_finds_the_same_pairs_with_more_products():
    true = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([1.4, 1.6, 3.0, -0.5])]).double().sort().values
    wanted = torch.cat([true[:2], true[-4:]])
    free = eigenpairs(diagonal(true), largest=4, smallest=2, tol=1e-5, generator=seeded())
    vector = len(true) * 8
    tight = eigenpairs(diagonal(true), largest=4, smallest=2, tol=1e-5, memory=26 * vector, generator=seeded())
    for found in (free, tight):
        assert found.converged
        assert ((found.values - wanted).abs() <= found.errors).all()
        misses = (found.vectors * true - found.values[:, None] * found.vectors).norm(dim=1)
        assert (misses <= found.residuals * 1.001).all()
    assert free.products > 20  # more than the tight basis of 20 holds
    assert free.products <= tight.products <= 3 * free.products


def test_a_basis_of_bounded_memory_holds_no_more_vectors_than_it_may():
    A = diagonal(torch.linspace(-1, 1, 4000))
    found = eigenpairs(A, tol=5e-3, memory=26 * 4000 * 8, generator=seeded())
    assert found.converged
    assert found.products > 24  # the basis, beside two vectors for the result
    krylov = Krylov(A, rows=24, generator=seeded())
    while not krylov.full:
        krylov.grow()
    krylov.compress(krylov.ritz(), [0, 1, 22, 23])
    assert (len(krylov), len(krylov.basis)) == (4, 24)
    with pytest.raises(ValueError, match=r"2 eigenpairs of size 4000 need 0\.000384 GB .* got memory=0\.00016 GB"):
        eigenpairs(A, memory=5 * 4000 * 8)


def test_a_warm_start_saves_products_and_follows_eigenvalues_that_cross():
    bulk = torch.randn(3000, generator=seeded(), dtype=torch.float64) * 0.2
    vectors, products, cold = None, [], []
    for step in range(20):  # one falls, the other rises
        true = torch.cat([bulk, torch.tensor([3 - step / 20, 2.03 + step / 20], dtype=torch.float64)])
        found = eigenpairs(diagonal(true), largest=2, smallest=0, tol=1e-3, start=vectors, generator=seeded(step))
        assert float((found.values - true[-2:].sort().values).abs().max()) <= 1e-3 * 3
        cold.append(eigenpairs(diagonal(true), largest=2, smallest=0, tol=1e-3, generator=seeded(step)).products)
        products.append(found.products)
        vectors = found.vectors
    assert sum(products) < 0.85 * sum(cold)


def test_two_starts_of_one_direction_help_whatever_their_signs():
    true = torch.cat([torch.randn(3000, generator=seeded(), dtype=torch.float64) * 0.2, torch.tensor([1.0]).double()])
    near = torch.zeros(2, 3001, dtype=torch.float64)
    near[:, -1] = 1
    near[0, 0] = 0.1
    options = {"largest": 1, "smallest": 0, "tol": 1e-3}
    same, opposite = (
        eigenpairs(diagonal(true), start=start, generator=seeded(1), **options)
        for start in (near, torch.stack([near[0], -near[1]]))
    )
    assert float(opposite.values[0]) == pytest.approx(1, abs=1e-3)
    assert opposite.products == same.products < eigenpairs(diagonal(true), generator=seeded(1), **options).products


def test_a_lead_brings_out_what_an_unlucky_start_hides():
    true = torch.cat(
        [torch.randn(2000, generator=seeded(), dtype=torch.float64) * 0.3, torch.tensor([2.0, 17, 20, 24, 44])]
    )
    size, hidden = len(true), 2000
    unlucky = min(
        range(4000), key=lambda seed: abs(torch.randn(size, generator=seeded(seed), dtype=true.dtype)[hidden])
    )
    lead = torch.randn(size, generator=seeded(1), dtype=torch.float64) * torch.where(true > 1.5, 1.0, 0.02)
    options = {"largest": 5, "smallest": 0}
    A = diagonal(true)
    assert float(eigenpairs(A, **options, generator=seeded(unlucky)).values[0]) < 1.9
    led = eigenpairs(replace(A, lead=lambda: lead), **options, generator=seeded(unlucky))
    torch.testing.assert_close(led.values, true[-5:], rtol=0, atol=44e-3)
    assert led.converged


@pytest.mark.parametrize("lead", [torch.zeros(1500), torch.full((1500,), math.nan)])
def test_a_lead_that_says_nothing_is_left_out(lead):
    A = diagonal(torch.linspace(-1, 1, 1500) ** 3, torch.float32)
    found, plain = (
        eigenpairs(B, largest=3, smallest=0, generator=seeded()) for B in (replace(A, lead=lambda: lead), A)
    )
    assert torch.equal(found.values, plain.values)
    assert found.products == plain.products


def test_starts_that_fit_no_vector_are_refused():
    with pytest.raises(ValueError, match="finite vectors of length 5"):
        eigenpairs(diagonal(torch.ones(5)), start=torch.ones(4))
    with pytest.raises(ValueError, match="finite vectors of length 5"):
        eigenpairs(diagonal(torch.ones(5)), start=torch.full((5,), math.nan))
