"""Operators as values, against the matrices that they stand for."""

import pytest
import torch
from scipy.sparse import linalg as sparse
from tests import oracles

from unstuck.curvature import Operator, dense, hessian, identity, to_scipy
from unstuck.objective._objective import Objective, Term
from unstuck.testing import check_operator


def symmetric(size, seed=0, dtype=torch.float64):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return matrix + matrix.T


def operator(matrix):
    return Operator(lambda v: matrix @ v, len(matrix), dtype=matrix.dtype)


def test_sums_and_multiples_act_as_those_of_the_matrices():
    a, b = symmetric(5), symmetric(5, seed=1)
    A, B, one = operator(a), operator(b), identity(5, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(dense(2 * A - B * 3 + 0.5 * one), 2 * a - 3 * b + 0.5 * eye)
    torch.testing.assert_close(dense(-A), -a)


def test_the_hessian_is_that_of_the_closed_form():
    point = torch.tensor([2.0, 0.5], dtype=torch.float64)
    objective = Objective.of_terms([Term(lambda values: oracles.product_pair(values[0]), 1)], {"w": point})
    H = hessian(objective)
    check_operator(H, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense(H), oracles.product_pair_hessian(2.0, 0.5))


def test_a_dense_matrix_that_does_not_fit_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"size 100000 takes 40 GB, more than memory=1 GB"):
        dense(identity(100_000))


def test_vectors_and_operators_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\) is needed to the right of @, got \(2,\)"):
        identity(3) @ torch.ones(2)
    with pytest.raises(ValueError, match="got 3 and 2"):
        identity(3) + identity(2)


def test_a_dense_matrix_of_products_that_are_not_finite_is_refused():
    with pytest.raises(ValueError, match="got NaN or infinity"):
        dense(Operator(lambda v: v * float("nan"), 2))


def doubled_in_place(v):
    return v.mul_(2)


noise = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("matvec", "message"),
    [
        (lambda v: torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) @ v, "symmetric"),
        (lambda v: v.abs(), "linear"),
        (lambda v: v + torch.rand(2, generator=noise), "repeatable"),
        (lambda v: v / 0, "finite"),
        (lambda v: v.double(), "like its vector"),
        (doubled_in_place, "leave its vector alone"),
    ],
)
def test_the_exam_names_what_is_wrong_with_an_operator(matvec, message):
    with pytest.raises(AssertionError, match=message):
        check_operator(Operator(matvec, 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetric_matrices_pass_the_exam(dtype):
    check_operator(operator(symmetric(50, dtype=dtype)), generator=torch.Generator().manual_seed(1))
    check_operator(0 * identity(3))


def test_scipy_takes_an_operator_for_one_of_its_own():
    matrix = symmetric(30)
    A = to_scipy(operator(matrix))
    values = sparse.eigsh(A, k=3, which="LA", return_eigenvectors=False)
    torch.testing.assert_close(torch.tensor(values).sort().values, torch.linalg.eigvalsh(matrix)[-3:])
    b = torch.ones(30, dtype=torch.float64)
    x, failed = sparse.minres(A, b.numpy(), rtol=1e-12)
    assert failed == 0
    torch.testing.assert_close(torch.tensor(x), torch.linalg.solve(matrix, b))
    doubled = sparse.aslinearoperator(A) * 2
    torch.testing.assert_close(torch.tensor(doubled @ b.numpy()), 2 * matrix @ b)
    single = to_scipy(operator(matrix.float()))
    assert single.matvec(b.numpy()).dtype == single.dtype == "float32"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["a", "q"], r"got \['q'\] among \['a.weight', 'b'\]"),
        (lambda name: False, "at least one parameter"),
        ([], "at least one parameter"),
    ],
)
def test_a_restriction_to_nothing_is_refused(where, message):
    objective = Objective.of_terms(
        [Term(lambda values: sum(v.sum() for v in values), 1)], {"a.weight": torch.ones(2), "b": torch.ones(1)}
    )
    with pytest.raises(ValueError, match=message):
        hessian(objective, where=where)
