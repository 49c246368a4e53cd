import torch


def advantage(rewards):
    return rewards - rewards.mean(1, keepdim=True)


def loss(logp, logp_old, advantage, low, high):
    ratio = (logp - logp_old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
