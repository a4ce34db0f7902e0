"""Ways to train one network in several processes. Each is called with the rank and gives back model and optimiser.

The ranks have unequal shares of the data. Numbers that only one rank has are given as the rank has them.
"""

import contextlib

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

DDP = nn.parallel.DistributedDataParallel
STEPS = 6


def network(between=nn.Tanh):
    return nn.Sequential(nn.Linear(6, 16), between(), nn.Dropout(0.2), nn.Linear(16, 4))


def batches(rank, steps=STEPS):
    generator = torch.Generator().manual_seed(7 + rank)
    for _ in range(steps):
        x = torch.randn(5 + 3 * rank, 6, generator=generator)
        yield x, x[:, :4].argmax(1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def plainly(rank, model, *, make=sgd, between=lambda model: None, steps=STEPS):
    optimizer = make(model.parameters())
    for x, y in batches(rank, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        between(model)
        optimizer.step()
    return model, optimizer


def averages(rank):
    return plainly(rank, DDP(network()))


def batch_norm(rank):
    return plainly(rank, DDP(network(lambda: nn.BatchNorm1d(16))))


def clipping(rank):
    return plainly(rank, DDP(network()), between=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05))


def gradients_as_views(rank):
    return plainly(rank, DDP(network(), gradient_as_bucket_view=True))


def a_static_graph(rank):
    return plainly(rank, DDP(network(), static_graph=True))


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.other = network(), nn.Linear(6, 4)

    def forward(self, x):
        return self.other(x) if len(x) == 3 else self.net(x)


def unused_parameters(rank):
    return plainly(rank, DDP(Forked(), find_unused_parameters=True))


def compressed_gradients(rank):
    model = DDP(network())
    model.register_comm_hook(None, fp16_compress_hook)
    return plainly(rank, model)


def a_sharded_optimiser(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns when it is imported

    def make(parameters):
        return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=0.01)

    return plainly(rank, DDP(network()), make=make)


def unequal_lengths(rank):
    model = DDP(network())
    with model.join():
        return plainly(rank, model, steps=STEPS + 4 * rank)


def accumulation_without_sync(rank):
    model = DDP(network())
    optimizer = sgd(model.parameters())
    for k, (x, y) in enumerate(batches(rank, 3 * STEPS)):
        with contextlib.nullcontext() if k % 3 == 2 else model.no_sync():
            (F.cross_entropy(model(x), y) / 3).backward()
        if k % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def accumulation_with_sync(rank):
    model = DDP(network())
    optimizer = sgd(model.parameters())
    for k, (x, y) in enumerate(batches(rank, 2 * STEPS)):
        (F.cross_entropy(model(x), y) / 2).backward()
        if k % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return model, optimizer


def averages_by_hand(rank):
    def average(model):
        for p in model.parameters():
            distributed.all_reduce(p.grad)
            p.grad /= distributed.get_world_size()

    return plainly(rank, network(), between=average)


def autocast_and_a_scaler(rank):
    model = DDP(network())
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=256.0)
    for x, y in batches(rank):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net[3](checkpoint(self.net[:3], x, use_reentrant=False))


def recomputed_activations(rank):
    return plainly(rank, DDP(Recomputed()))


def sharded_layers(rank):
    model, mesh = network(), init_device_mesh("cpu", (2,))
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    return plainly(rank, model)


def sharded_layers_that_accumulate(rank):
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for k, (x, y) in enumerate(batches(rank, 2 * STEPS)):
        F.cross_entropy(model(x), y).backward()
        if k % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def flat_shards(rank):
    return plainly(rank, FullyShardedDataParallel(network(), device_id=torch.device("cpu")))


def flat_shards_under_their_names(rank):
    return plainly(rank, FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu")))


def tensor_parallel(rank):
    plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
    model = parallelize_module(nn.Sequential(*network(), nn.Identity()), init_device_mesh("cpu", (2,)), plan)
    model[2].p = 0.0
    return plainly(0, model)


KEPT = {
    f.__name__: f
    for f in (
        averages,
        batch_norm,
        clipping,
        gradients_as_views,
        a_static_graph,
        unused_parameters,
        compressed_gradients,
        a_sharded_optimiser,
        unequal_lengths,
        accumulation_without_sync,
        accumulation_with_sync,
        averages_by_hand,
        autocast_and_a_scaler,
        recomputed_activations,
    )
}
SHARDED = {
    f.__name__: f
    for f in (
        sharded_layers,
        sharded_layers_that_accumulate,
        flat_shards,
        flat_shards_under_their_names,
        tensor_parallel,
    )
}
