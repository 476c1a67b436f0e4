"""What the cross-attention layers of a UNet are called: by diffusers' names for their blocks, computed from its shape."""

from unet.unet import UNetConfig


def layer_names(config: UNetConfig) -> list[str]:
    """A name for each cross-attention layer, in the order of an adapter's keys: down, up, and the middle last.

    `down.block_2.1` is `down_blocks.2.attentions.1` there; the layers of one transformer share its name. The middle is `mid`.
    """
    down = [(f"down.block_{i}.{j}", depth) for i, row in enumerate(config.down) for j, depth in enumerate(row)]
    up = [(f"up.block_{i}.{j}", depth) for i, row in enumerate(config.up) for j, depth in enumerate(row)]
    middle = [("mid", depth) for depth in config.middle]
    return [name for name, depth in (*down, *up, *middle) for _ in range(depth)]
