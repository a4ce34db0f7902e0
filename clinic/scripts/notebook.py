"""A notebook on knowledge distillation, its cells executed one by one as nbconvert does; one of them is run again."""

import argparse
import ast

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=10**9, help="upper limit of steps in an epoch")
parser.add_argument("--save")
args = parser.parse_args()

CELLS = {}

CELLS[1] = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(42)
device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
"""

CELLS[2] = """
X, y = load_digits(return_X_y=True)
X = torch.tensor(X, dtype=torch.float32, device=device) / 16
y = torch.tensor(y, device=device)
train_dl = DataLoader(TensorDataset(X[:1400], y[:1400]), batch_size=64, shuffle=True)
X_test, y_test = X[1400:], y[1400:]
X.shape, y.bincount()
"""

CELLS[3] = """
class Net(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        layers = [nn.Linear(64, width), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1)]
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))

    def forward(self, x):
        return self.net(x)

teacher, student = Net(96, 2).to(device), Net(12, 0).to(device)
sum(p.numel() for p in teacher.parameters()), sum(p.numel() for p in student.parameters())
"""

CELLS[4] = """
def test(model):
    model.eval()
    with torch.no_grad():
        return (model(X_test).argmax(1) == y_test).float().mean().item()

def fit(model, optimizer, loss_fn, epochs):
    history = []
    for epoch in range(epochs):
        model.train()
        for i, (xb, yb) in enumerate(train_dl):
            if i >= STEPS:
                break
            loss = loss_fn(model, xb, yb)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        print(f"epoch {epoch}: loss {sum(history[-i:]) / max(i, 1):.4f}, accuracy {test(model):.4f}")
    return history
"""

CELLS[5] = """
opt = optim.AdamW(teacher.parameters(), lr=2e-3)
h = fit(teacher, opt, lambda model, xb, yb: F.cross_entropy(model(xb), yb), epochs=6)
"""

CELLS[6] = """
T, alpha = 4.0, 0.3

def distill(model, xb, yb):
    with torch.no_grad():
        soft_targets = F.softmax(teacher(xb) / T, dim=-1)
    logits = model(xb)
    soft_prob = F.log_softmax(logits / T, dim=-1)
    # Scaled by T**2 as suggested by the authors of "Distilling the knowledge in a neural network"
    soft_loss = torch.sum(soft_targets * (soft_targets.log() - soft_prob)) / soft_prob.size(0) * T**2
    return (1 - alpha) * soft_loss + alpha * F.cross_entropy(logits, yb)

teacher.eval()
opt = optim.Adam(student.parameters(), lr=3e-3)
"""

CELLS[7] = """
h = fit(student, opt, distill, epochs=4)
min(h) < h[0]
"""

CELLS[8] = """
print(f"teacher {test(teacher):.4f} student {test(student):.4f}")
if SAVE:
    torch.save([teacher.state_dict(), student.state_dict(), opt.state_dict()], SAVE)
"""

ORDER = (1, 2, 3, 4, 5, 6, 7, 7, 8)  # the cell that trains is run until it looks good


def run_cell(count, source, namespace):
    """What IPython does: all statements, and the value of the last expression shown."""
    tree = ast.parse(source, f"<cell {count}>")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"<cell {count}>", "exec"), namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), namespace)
        if value is not None:
            print(f"Out[{count}]: {value}")


if __name__ == "__main__":
    namespace = {"__name__": "__main__", "STEPS": args.steps, "SAVE": args.save}
    for count, cell in enumerate(ORDER, 1):
        print(f"In [{count}]")
        run_cell(count, CELLS[cell], namespace)
