"""A graph convolutional network by hand in the manner of pygcn: sparse products, few labels, one batch that is all."""

import argparse
import math

import torch
import torch.nn.functional as F
import torch.optim as optim
from torch.nn.modules.module import Module
from torch.nn.parameter import Parameter

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=200, help="Number of epochs to train.")
parser.add_argument("--lr", type=float, default=0.01, help="Initial learning rate.")
parser.add_argument("--weight_decay", type=float, default=5e-4, help="Weight decay (L2 loss on parameters).")
parser.add_argument("--hidden", type=int, default=16, help="Number of hidden units.")
parser.add_argument("--dropout", type=float, default=0.5, help="Dropout rate (1 - keep probability).")
parser.add_argument("--save")
args = parser.parse_args()
torch.manual_seed(42)


def load_data(nodes=400, classes=4, features=60):
    """Papers that cite within their field, with words that their field uses more often."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (nodes,), generator=g)
    same = labels[:, None] == labels
    adj = (torch.rand(nodes, nodes, generator=g) < torch.where(same, 0.03, 0.004)).triu(1).float()
    adj = adj + adj.T + torch.eye(nodes)
    adj = adj / adj.sum(1, keepdim=True)
    likely = 0.02 + 0.1 * torch.rand(classes, features, generator=g)
    words = (torch.rand(nodes, features, generator=g) < likely[labels]).float()
    words = words / words.sum(1, keepdim=True).clamp(min=1)
    return adj.to_sparse_coo(), words, labels, torch.arange(60), torch.arange(60, 160), torch.arange(160, nodes)


class GraphConvolution(Module):
    """Simple GCN layer, similar to https://arxiv.org/abs/1609.02907"""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = Parameter(torch.FloatTensor(in_features, out_features))
        self.bias = Parameter(torch.FloatTensor(out_features))
        self.reset_parameters()

    def reset_parameters(self):
        stdv = 1.0 / math.sqrt(self.weight.size(1))
        self.weight.data.uniform_(-stdv, stdv)
        self.bias.data.uniform_(-stdv, stdv)

    def forward(self, input, adj):
        support = torch.mm(input, self.weight)
        output = torch.spmm(adj, support)
        return output + self.bias


class GCN(Module):
    def __init__(self, nfeat, nhid, nclass, dropout):
        super().__init__()
        self.gc1 = GraphConvolution(nfeat, nhid)
        self.gc2 = GraphConvolution(nhid, nclass)
        self.dropout = dropout

    def forward(self, x, adj):
        x = F.relu(self.gc1(x, adj))
        x = F.dropout(x, self.dropout, training=self.training)
        x = self.gc2(x, adj)
        return F.log_softmax(x, dim=1)


def accuracy(output, labels):
    return output.max(1)[1].eq(labels).double().mean()


adj, features, labels, idx_train, idx_val, idx_test = load_data()
model = GCN(nfeat=features.shape[1], nhid=args.hidden, nclass=labels.max().item() + 1, dropout=args.dropout)
optimizer = optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)


def train(epoch):
    model.train()
    optimizer.zero_grad()
    output = model(features, adj)
    loss_train = F.nll_loss(output[idx_train], labels[idx_train])
    acc_train = accuracy(output[idx_train], labels[idx_train])
    loss_train.backward()
    optimizer.step()
    # Evaluate validation set performance separately, deactivates dropout during validation run.
    model.eval()
    output = model(features, adj)
    loss_val = F.nll_loss(output[idx_val], labels[idx_val])
    acc_val = accuracy(output[idx_val], labels[idx_val])
    if epoch % 10 == 0:
        print(
            f"Epoch: {epoch + 1:04d} loss_train: {loss_train.item():.4f} acc_train: {acc_train.item():.4f} "
            f"loss_val: {loss_val.item():.4f} acc_val: {acc_val.item():.4f}"
        )


for epoch in range(args.epochs):
    train(epoch)
model.eval()
output = model(features, adj)
loss_test = F.nll_loss(output[idx_test], labels[idx_test])
print(f"Test set results: loss= {loss_test.item():.4f} accuracy= {accuracy(output[idx_test], labels[idx_test]):.4f}")
if args.save:
    torch.save(model.state_dict(), args.save)
