"""Draw every emoji of Noto Color Emoji at 64x64 on white and write the pictures with their captions."""

from pathlib import Path

import emoji
import numpy as np
from common import IMAGE_SIZE, base_parser
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one size in which the font stores its bitmaps
GLYPH_BOX = (0, 0, 136, 128)  # what exactly one drawn glyph covers at that size


def caption_of(name: str) -> str:
    """`:red_apple:` becomes `red apple`."""
    return name.strip(":").replace("_", " ").lower()


def draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One emoji, centred on a white square and scaled down."""
    side = GLYPH_BOX[2]
    canvas = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(canvas).text((0, (side - GLYPH_BOX[3]) // 2), character, font=font, embedded_color=True)
    return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def render_all(font: ImageFont.FreeTypeFont) -> tuple[list[str], list[np.ndarray]]:
    """Captions and pictures of all fully qualified emoji that the font knows."""
    captions, images = [], []
    for character, data in tqdm(emoji.EMOJI_DATA.items(), desc="render"):
        qualified = data["status"] == emoji.STATUS["fully_qualified"]
        # A sequence that the font lacks falls apart into several glyphs, a lone one into an empty box.
        if qualified and font.getbbox(character) == GLYPH_BOX:
            captions.append(caption_of(data["en"]))
            images.append(draw(character, font))
    return captions, images


def main() -> None:
    """Render the data set and list its captions."""
    parser = base_parser(__doc__)
    parser.add_argument("--font", type=Path, default=FONT, help="Noto Color Emoji, bitmap version")
    parser.add_argument("--captions", type=Path, help="also write the captions to this text file, one a line")
    args = parser.parse_args()
    if not features.check("raqm"):
        raise SystemExit("this Pillow lacks RAQM, without which emoji sequences are not joined")
    captions, images = render_all(ImageFont.truetype(str(args.font), STRIKE))
    args.run.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.run / "emoji.npz", images=np.stack(images), captions=np.array(captions))
    if args.captions:
        args.captions.write_text("\n".join(captions) + "\n", encoding="utf-8")
    print(f"{len(captions)} pictures, {len(set(captions))} different captions")


if __name__ == "__main__":
    main()
