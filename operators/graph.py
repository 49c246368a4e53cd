"""operators/graph.py: one decoding step as a CUDA graph.

A small model's step is some two hundred small kernels. Launching them from Python takes longer than
running them. A CUDA graph records them once and launches all with one call. It replays addresses,
not values. Hence three rules:

    - the cache, the last tokens, their positions and the random numbers stay in the same memory
    - weights are rounded in place (Numerics.refresh), so that the next replay reads the new ones
    - shapes are fixed: one graph per number of rows (halved as rows finish) and per 64 slots in use

With GraphStep.capture = False the same steps run on the same buffers without a graph. That is what
the tests compare on a CPU.
"""
import torch

from model import KVCache

BUCKET = 64           # the cache is read up to the next multiple of this many slots; one graph each


class GraphStep:
    """token (R,), u (R,) -> the next token of each row and its log-prob. Same interface as
    sample.EagerStep.

    choose(hidden, u) -> token, logp draws from the policy. Holds a KV cache of `rows` x `width`
    slots for good."""

    capture = True
    side = None              # one stream for all recordings: cuBLAS keeps 32 MiB for each it has seen

    def __init__(self, model, choose, rows, width):
        self.model, self.choose = model, choose
        device = model.embedding.device
        self.cache = KVCache(model.cfg, rows, -(-width // BUCKET) * BUCKET, model.num)
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)
        self.u = torch.zeros(rows, dtype=torch.float64, device=device)
        self.logp = torch.zeros(rows, device=device)
        self.graphs, self.pool = {}, None

    def start(self, cache, index, lengths):
        """Row i continues row index[i] of a prefilled cache, after its first lengths[i] tokens."""
        n = cache.k.shape[3]
        self.cache.k.zero_(), self.cache.v.zero_()     # masked slots weigh 0, and 0 times inf is NaN
        for mine, theirs in ((self.cache.k, cache.k), (self.cache.v, cache.v)):
            mine[:, :len(index), :, :n] = theirs[:, index]
        self.position[:len(index)] = lengths
        self.longest = n
        return self

    def keep(self, index):
        """Go on with these rows alone."""
        for t in (self.cache.k, self.cache.v):
            t[:, :len(index)] = t[:, index]
        self.position[:len(index)] = self.position[index]

    def __call__(self, token, u):
        rows = len(token)
        self.token[:rows] = token
        self.u[:rows] = u
        end = -(-(self.longest + 1) // BUCKET) * BUCKET
        self.longest += 1
        if not self.capture:
            self._step(rows, end)
        else:
            if (rows, end) not in self.graphs:
                self.graphs[rows, end] = self._record(rows, end)
            self.graphs[rows, end].replay()
        return self.token[:rows].clone(), self.logp[:rows]

    def _step(self, rows, end):
        cache = self.cache.part(rows, self.position[:rows], end - 1)
        hidden = self.model(self.token[:rows, None], cache)[:, 0]
        token, logp = self.choose(hidden, self.u[:rows])
        self.token[:rows] = token
        self.logp[:rows] = logp
        self.position[:rows] += 1

    def _record(self, rows, end):
        state = [(t, t.clone()) for t in (self.token, self.position)]

        def restore():                # a step done twice at one position writes the same keys twice
            for t, value in state:
                t.copy_(value)
        side = GraphStep.side = GraphStep.side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):             # libraries set themselves up on their first calls
            for _ in range(2):
                self._step(rows, end)
                restore()
        torch.cuda.current_stream().wait_stream(side)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=side):         # recorded, not run
            self._step(rows, end)
        return graph
