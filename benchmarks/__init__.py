"""Token sweeps: time, peak memory and multiply-adds of attentions and backbones against the size of the input."""
