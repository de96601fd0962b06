"""The tiny networks and tokenizers of emoji-flux, and the FluxPipeline made of them."""

import json
from collections import Counter
from math import log
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LATENT_CHANNELS = 12
CLIP_WIDTH = 128
CLIP_LENGTH = 32
CLIP_VOCABULARY = 2048
T5_WIDTH = 192


def build_vae() -> AutoencoderKL:
    """Two levels, so 64x64 pictures become 12x32x32 latents: as many numbers as pixels, hence next to no loss."""
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer() -> FluxTransformer2DModel:
    """FLUX with 2 double and 8 single blocks of width 256; every block starts as the identity."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder whose pooled output FLUX adds to the timestep embedding."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The text encoder whose token states enter FLUX's joint attention."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=48,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def train_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-level BPE laid out as CLIP's own: bytes, bytes that end a word, merges, special tokens."""
    blank = CLIPTokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = alphabet + [letter + "</w>" for letter in alphabet]
    specials = [blank.bos_token, blank.eos_token]
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY - len(letters),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = blank.backend_tokenizer
    backend.train_from_iterator(captions, trainer)
    learned = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    pieces = dict.fromkeys(letters + [piece for piece, _ in learned if piece not in specials] + specials)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def build_t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """Unigram vocabulary of all caption words; single characters, far less likely, spell out everything else."""
    words = Counter(word for caption in captions for word in caption.split())
    total = sum(words.values())
    characters = {chr(code) for code in range(33, 127)} | set("".join(words))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -15.0)]
    pieces += [("▁" + word, log(count / total)) for word, count in sorted(words.items())]
    pieces += [(character, -15.0) for character in sorted(characters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def load_or_build_tokenizers(run: Path, captions: list[str]) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """The tokenizers of this run, made at its first start and kept from then on."""
    folders = run / "tokenizer", run / "tokenizer_2"
    if not all(folder.exists() for folder in folders):
        train_clip_tokenizer(captions).save_pretrained(folders[0])
        build_t5_tokenizer(captions).save_pretrained(folders[1])
    return CLIPTokenizer.from_pretrained(folders[0]), T5Tokenizer.from_pretrained(folders[1])


class EmojiFlux(nn.Module):
    """The three networks that are trained together."""

    def __init__(self, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer):
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = build_clip(clip_tokenizer)
        self.text_encoder_2 = build_t5(t5_tokenizer)

    def start_from(self, folder: Path) -> None:
        """Take over the weights of a saved pipeline."""
        kinds = {"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
        for name, kind in kinds.items():
            saved = kind.from_pretrained(folder / name).float()
            getattr(self, name).load_state_dict(saved.state_dict())

    def encode(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled CLIP output and T5 states, without attention masks, as FluxPipeline.encode_prompt makes them."""
        return self.text_encoder(clip_ids).pooler_output, self.text_encoder_2(t5_ids)[0]


def save_pipeline(folder: Path, model: EmojiFlux, vae: AutoencoderKL, tokenizers: tuple, dtype: torch.dtype) -> None:
    """Write everything as one FluxPipeline; the networks are converted in place."""
    for network in (model, vae):
        network.cpu().to(dtype)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizers[0],
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizers[1],
        transformer=model.transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # Asked for no dtype, transformers takes the one named here and diffusers float32: they have to agree.
    edit_json(folder / "text_encoder/config.json", dtype="float32")
    edit_json(folder / "text_encoder_2/config.json", dtype="float32")
    # Where the VAE was read from means nothing on another machine.
    edit_json(folder / "vae/config.json", _name_or_path="")
    add_transformers_4_files(folder)


def add_transformers_4_files(folder: Path) -> None:
    """Let transformers 4 load what transformers 5 wrote, and 5 go on loading it."""
    path = folder / "text_encoder/model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    model = json.loads((folder / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "tokenizer/vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    edit_json(folder / "tokenizer_2/tokenizer_config.json", extra_special_tokens={})
    # In transformers 5 both names mean one class; in 4 only the fast one reads tokenizer.json.
    edit_json(folder / "model_index.json", tokenizer_2=["transformers", "T5TokenizerFast"])


def edit_json(path: Path, **changes: object) -> None:
    """Replace some top-level values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
