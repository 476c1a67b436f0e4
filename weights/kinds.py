"""Tells what a file is from the names and shapes of its tensors, never from its name."""

from weights.files import State


def what_is(state: State) -> str:
    """One phrase that says what a file seems to be, for messages."""

    def has(*parts: str) -> bool:
        return any(all(part in key for part in parts) for key in state)

    def starts(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in state)

    if has("lora_down") or has("lora_up") or has("lora_A") or has(".lora."):
        return "a LoRA" + (" with an IP-Adapter of the FaceID kind" if starts("ip_adapter.") else "")
    if starts("ip_adapter.") or starts("image_proj.") or starts("adapter_modules."):
        return f"an IP-Adapter ({adapter_is(state)})"
    if starts("model.diffusion_model."):
        return f"a whole {family(state)} checkpoint"
    if starts("conditioner.embedders."):
        return "part of an SDXL checkpoint"
    if starts("control_model.") or starts("controlnet_") or starts("input_hint_block."):
        return "a ControlNet"
    if starts("double_blocks.") or starts("model.diffusion_model.double_blocks."):
        return "a FLUX checkpoint"
    if starts("input_blocks."):
        return "a UNet alone, without autoencoder and text tower"
    if starts("down_blocks."):
        return "a UNet of a diffusers folder"
    if starts("vision_model.") or starts("visual."):
        text = starts("text_model.") or starts("transformer.resblocks.")
        return f"a CLIP {'model' if text else 'image encoder'} of width {clip_width(state)}"
    if starts("text_model."):
        return "a CLIP text tower"
    if starts("first_stage_model.") or (starts("encoder.") and starts("decoder.")):
        return "an autoencoder"
    sample = ", ".join(list(state)[:3])
    return f"something unknown (its first keys: {sample})"


def family(state: State) -> str:
    """'SD 1.x', 'SD 2.x', 'SDXL' or another word for the base model that a whole checkpoint holds."""
    if "model.diffusion_model.label_emb.0.0.weight" in state:
        return "SDXL"
    if any(key.startswith("model.diffusion_model.joint_blocks.") for key in state):
        return "SD 3"
    if any(key.startswith("model.diffusion_model.double_blocks.") for key in state):
        return "FLUX"
    if any(key.startswith("cond_stage_model.model.") for key in state):
        return "SD 2.x"
    return "SD 1.x"


def adapter_is(state: State) -> str:
    """What kind of adapter, for which base."""
    if "image_proj.latents" in state:
        kind = f"plus, reads {columns(state, 'image_proj.proj_in.weight')} wide patch features"
    elif "image_proj.perceiver_resampler.proj_in.weight" in state:
        kind = "FaceID plus"
    elif "image_proj.proj.3.weight" in state:
        kind = f"full-face, reads {columns(state, 'image_proj.proj.0.weight')} wide patch features"
    elif "image_proj.proj.2.weight" in state:
        kind = "FaceID"
    elif "image_proj.proj.weight" in state:
        kind = f"base, reads embeddings of {columns(state, 'image_proj.proj.weight')}"
    else:
        return "of an unknown kind"
    return f"{kind}, {adapter_base(state)}"


def adapter_base(state: State) -> str:
    """Which base model an adapter was made for, as far as its tensors tell."""
    width = columns(state, "ip_adapter.1.to_k_ip.weight")
    return {768: "for SD 1.x", 1024: "for SD 2.x", 2048: "for SDXL"}.get(width, f"for a base with {width} wide tokens")


def columns(state: State, key: str) -> int:
    """Width of a matrix that a damaged file may lack: then 0."""
    return state[key].shape[-1] if key in state and state[key].ndim else 0


ENCODERS = {1024: "ViT-H/14", 1280: "ViT-bigG/14", 768: "ViT-L/14"}  # by the width of the image embedding


def clip_width(state: State) -> int:
    for key in ("vision_model.embeddings.class_embedding", "visual.class_embedding"):
        if key in state:
            return state[key].shape[-1]
    return 0
