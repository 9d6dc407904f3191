"""The letters of all shapes in this code base.

    B  batch                                  L  tokens of the sequence that is denoised, or of any sequence
    T  video frames                           S  tokens that are attended to; times of a sampler, steps + 1
    F  latent frames, (T - 1) / 4 + 1         N  attention heads
    H  height                                 K  width of one head
    W  width; windows of the vision tower     Q  MetaQueries
    C  channels                               P  patches of the vision tower, or of a latent frame
    Z  channels of the autoencoder's latents  V  vision features, the language model's tokens of a clip
    M  channels of mask and first frame       X  values of one patch
    D  model width                            I  CLIP tokens of an image; input width of a layer
    E  width of a text context                J  width of CLIP features
    R  rank of an adapter                     O  output width of a layer

A lower-case letter is a second size of the same kind in one signature (`H W` pixels, `h w` latent rows and columns); k is K / 2, the
pairs of a rotation. `*lead` stands for any axes. A size without a letter is a number, an expression in braces or a word.

Order of axes: video "B T H W C" in [-1, 1], latents "B F H W C", tokens "B L D", heads "B L N K".
Layouts of other code bases appear only in `weights/`.
"""
