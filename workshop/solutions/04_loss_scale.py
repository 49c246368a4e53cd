import math

import torch


def lost(gradients, scale):
    some = gradients[gradients != 0]
    return ((some * scale).half() == 0).float().mean()


def choose_scale(gradients):
    return 2.0 ** math.floor(math.log2(65504 / float(gradients.abs().max())))


def update(parameters, optimizer, scaler, max_norm):
    scaler.unscale_(optimizer)                                  # first: the clip is for true sizes
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    scaler.step(optimizer)                                      # skipped if a gradient is inf or NaN
    scaler.update()                                             # half the scale after a skip
    optimizer.zero_grad()
    return norm
