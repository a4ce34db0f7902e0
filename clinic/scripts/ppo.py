"""PPO in one file in the manner of CleanRL, on several poles at once: rollouts, advantages, epochs of minibatches."""

import argparse

import torch
import torch.nn as nn
import torch.optim as optim
from torch.distributions.categorical import Categorical

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30, help="iterations of a rollout and its updates")
parser.add_argument("--num-envs", type=int, default=4)
parser.add_argument("--num-steps", type=int, default=128)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--gamma", type=float, default=0.99)
parser.add_argument("--gae-lambda", type=float, default=0.95)
parser.add_argument("--num-minibatches", type=int, default=4)
parser.add_argument("--update-epochs", type=int, default=4)
parser.add_argument("--clip-coef", type=float, default=0.2)
parser.add_argument("--ent-coef", type=float, default=0.01)
parser.add_argument("--vf-coef", type=float, default=0.5)
parser.add_argument("--max-grad-norm", type=float, default=0.5)
parser.add_argument("--save")
args = parser.parse_args()
torch.manual_seed(1)


class Poles:
    """Poles on carts, after Barto, Sutton and Anderson (1983); those that fall start again."""

    def __init__(self, n):
        self.generator = torch.Generator().manual_seed(1)
        self.state, self.age = self.fresh(n), torch.zeros(n)

    def fresh(self, n):
        return torch.rand(n, 4, generator=self.generator) * 0.1 - 0.05

    def step(self, action):
        x, v, angle, spin = self.state.unbind(1)
        force = torch.where(action == 1, 10.0, -10.0)
        push = (force + 0.05 * spin**2 * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
        pull = push - 0.05 * turn * angle.cos() / 1.1
        self.state = torch.stack([x + 0.02 * v, v + 0.02 * pull, angle + 0.02 * spin, spin + 0.02 * turn], 1)
        self.age += 1
        done = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.2095) | (self.age >= 200)
        lengths = self.age[done].tolist()
        self.state = torch.where(done[:, None], self.fresh(len(done)), self.state)
        self.age[done] = 0
        return self.state, torch.ones(len(done)), done.float(), lengths


def layer_init(layer, std=2**0.5, bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(
            layer_init(nn.Linear(4, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), 1.0),
        )
        self.actor = nn.Sequential(
            layer_init(nn.Linear(4, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 2), 0.01),
        )

    def get_action_and_value(self, x, action=None):
        probs = Categorical(logits=self.actor(x))
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x).flatten()


envs, agent = Poles(args.num_envs), Agent()
optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
next_obs, next_done = envs.state, torch.zeros(args.num_envs)
batch_size = args.num_envs * args.num_steps
for iteration in range(1, args.steps + 1):
    optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / args.steps) * args.learning_rate
    rows, finished = [], []
    for _ in range(args.num_steps):
        with torch.no_grad():
            action, logprob, _, value = agent.get_action_and_value(next_obs)
        obs, dones = next_obs, next_done
        next_obs, reward, next_done, lengths = envs.step(action)
        rows.append((obs, action, logprob, reward, dones, value))
        finished += lengths
    obs, actions, logprobs, rewards, dones, values = (torch.stack(column) for column in zip(*rows, strict=True))
    with torch.no_grad():  # bootstrap value if not done
        next_value = agent.critic(next_obs).flatten()
        advantages, lastgaelam = torch.zeros_like(rewards), 0
        for t in reversed(range(args.num_steps)):
            last = t == args.num_steps - 1
            nonterminal = 1.0 - (next_done if last else dones[t + 1])
            delta = rewards[t] + args.gamma * (next_value if last else values[t + 1]) * nonterminal - values[t]
            advantages[t] = lastgaelam = delta + args.gamma * args.gae_lambda * nonterminal * lastgaelam
        returns = advantages + values
    b_obs, b_actions, b_logprobs = obs.reshape(-1, 4), actions.reshape(-1), logprobs.reshape(-1)
    b_advantages, b_returns, b_values = advantages.reshape(-1), returns.reshape(-1), values.reshape(-1)
    clipfracs = []
    for _ in range(args.update_epochs):
        for mb_inds in torch.randperm(batch_size).split(batch_size // args.num_minibatches):
            _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
            logratio = newlogprob - b_logprobs[mb_inds]
            ratio = logratio.exp()
            with torch.no_grad():
                clipfracs += [((ratio - 1.0).abs() > args.clip_coef).float().mean().item()]
            mb_advantages = b_advantages[mb_inds]
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            pg_loss1 = -mb_advantages * ratio
            pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = torch.max(pg_loss1, pg_loss2).mean()
            v_clipped = b_values[mb_inds] + (newvalue - b_values[mb_inds]).clamp(-args.clip_coef, args.clip_coef)
            v_loss_max = torch.max((newvalue - b_returns[mb_inds]) ** 2, (v_clipped - b_returns[mb_inds]) ** 2)
            loss = pg_loss - args.ent_coef * entropy.mean() + args.vf_coef * 0.5 * v_loss_max.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
    length = sum(finished) / max(len(finished), 1)
    print(f"iteration {iteration} episodic_length {length:.1f} value_loss {v_loss_max.mean().item() / 2:.4f}", end=" ")
    print(f"policy_loss {pg_loss.item():.5f} clipfrac {sum(clipfracs) / len(clipfracs):.3f}")
if args.save:
    torch.save([agent.state_dict(), optimizer.state_dict()], args.save)
