"""Exercise 4: why a loss scale. The page is workshop/pages/04_loss_scale.md"""
import torch


def lost(gradients, scale):
    """gradients FP32 (N,), some of them 0. -> of those that are not 0, the share that becomes 0
    when it is multiplied by `scale` and rounded to FP16."""
    return 0.0                                                  # your code in place of this line


def choose_scale(gradients):
    """-> the largest power of two at which none of these gradients becomes inf in FP16."""
    return 1.0                                                  # your code in place of this line


def update(parameters, optimizer, scaler, max_norm):
    """One update. The parameters' gradients are multiplied by the loss scale. -> the norm of the
    true gradient, before it is clipped.

    These lines run, and are wrong in two ways. Change their order, and add what is missing."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    optimizer.zero_grad()
    return norm
