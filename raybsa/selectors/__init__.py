"""Parts of a learned block selector: pooled q and k, a gate, top-k in tiles, and the losses that train the gate."""
