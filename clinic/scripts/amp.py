"""Mixed precision in the manner of the AMP recipe: autocast and a GradScaler, or a network in bfloat16 throughout."""

import argparse

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--pure", action="store_true", help="bfloat16 weights, without autocast")
parser.add_argument("--fp16", action="store_true", help="autocast to float16, so that the scale matters")
parser.add_argument("--save")
args = parser.parse_args()
torch.manual_seed(0)

batch_size, in_size, out_size, num_layers = 32, 32, 8, 3


def make_model(in_size, out_size, num_layers):
    layers = []
    for _ in range(num_layers - 1):
        layers.append(torch.nn.Linear(in_size, in_size))
        layers.append(torch.nn.ReLU())
    layers.append(torch.nn.Linear(in_size, out_size))
    return torch.nn.Sequential(*tuple(layers))


teacher = torch.nn.Linear(in_size, out_size)
net = make_model(in_size, out_size, num_layers)
if args.pure:
    net.bfloat16()
opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler("cpu", enabled=not args.pure, init_scale=2.0**40, growth_interval=50)
loss_fn = torch.nn.MSELoss()
dtype = torch.float16 if args.fp16 else torch.bfloat16

skipped = 0
for step in range(args.steps):
    input = torch.randn(batch_size, in_size)
    with torch.no_grad():
        target = teacher(input).tanh()
    with torch.autocast(device_type="cpu", dtype=dtype, enabled=not args.pure):
        output = net(input.to(next(net.parameters()).dtype))
        loss = loss_fn(output.float(), target)
    scaler.scale(loss).backward()
    # All gradients are scaled: unscale them before they are clipped
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm=1.0)
    scaler.step(opt)
    before = scaler.get_scale()
    scaler.update()
    skipped += scaler.get_scale() < before
    opt.zero_grad()  # set_to_none=True here can modestly improve performance
    if step % 20 == 0:
        print(f"{step} loss {loss.item():.5f} scale {scaler.get_scale():.0f} skipped {skipped}")
if args.save:
    torch.save([net.state_dict(), opt.state_dict(), scaler.state_dict()], args.save)
