"""The letters of every shape in this code base.

Lower case marks a second size of the same kind in one signature (`H W` pixels, `h w` latent rows and columns).

    B  batch                          L  tokens of the sequence being denoised
    T  video frames                   S  context: what is attended to
    F  latent frames, (T - 1) / 4 + 1 D  model width
    H  height   W  width              N  attention heads
    C  channels                       K  width of one head
    R  LoRA rank                      M  hidden width of an MLP
    Q  MetaQueries

Wire order: video "B T H W C" in [-1, 1], latents "B F H W C", tokens "B L D", heads "B L N K".
Layouts of other code bases appear in `weights/` and nowhere else.
"""
