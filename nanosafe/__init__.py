"""nanosafe: safety alignment of large reasoning models by SFT and REINFORCE++, from scratch."""
