"""The small CLIPs, odd in every way a shape can be, whose outputs openai_outputs.safetensors holds."""

from miniclip.config import CLIPConfig, PreprocessConfig, ResNetConfig, TextConfig, ViTConfig, openai_transformer

CASES = {
    "vit": CLIPConfig(
        embed_dim=48,
        vision=ViTConfig(image_size=40, patch_size=8, transformer=openai_transformer(128, 3)),
        text=TextConfig(context_length=13, vocab_size=301, transformer=openai_transformer(64, 2)),
        preprocess=PreprocessConfig(40),
    ),
    "vit-deep": CLIPConfig(
        embed_dim=33,
        vision=ViTConfig(image_size=35, patch_size=7, transformer=openai_transformer(64, 7)),
        text=TextConfig(context_length=77, vocab_size=97, transformer=openai_transformer(192, 5)),
        preprocess=PreprocessConfig(35),
    ),
    "resnet": CLIPConfig(
        embed_dim=40,
        vision=ResNetConfig(image_size=96, width=8, layers=(1, 2, 3, 1), heads=4),
        text=TextConfig(context_length=16, vocab_size=120, transformer=openai_transformer(64, 1)),
        preprocess=PreprocessConfig(96),
    ),
    "resnet-wide": CLIPConfig(
        embed_dim=24,
        vision=ResNetConfig(image_size=64, width=20, layers=(2, 1, 1, 2), heads=10),
        text=TextConfig(context_length=9, vocab_size=64, transformer=openai_transformer(128, 2)),
        preprocess=PreprocessConfig(64),
    ),
}
IMAGES = 3
TEXTS = 6
