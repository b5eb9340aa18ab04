"""The names in ERNIEKit's vision-language files that have no field here: see compat.py for the kinds of rule."""

from erniekit.config import compat
from erniekit.config.compat import EVERY, Alias, Fixed, Later

ALIASES: dict[str, Alias] = {
    "one_sample_in_one_seq": Alias("packing", compat.negated),
    "dataset_name": Alias("text_dataset_type", compat.reader_of_calls, compat.other_reader),
}

# Reason -> the keys that have no effect for that reason; a reason of compat_keys.py is continued here.
NO_EFFECT: dict[str, str] = {
    "the model's config.json says whether it sees pictures": "multimodal enable_mm",
    "a record brings its own questions": "prompt_dir corpus_name",
    "every record is trained as it stands, never as an example in front of another one": (
        "factor example_from_same_task_prob pseudo_sampling_prob trigger_data_prob min_shot max_shot"
    ),
    "the chat template decides how system texts and earlier rounds are written": "add_sys_token drop_history_with_k",
    "samples go from the workers to the trainer in one way": "serialize_output",
    "a picture has as many tokens as its size after resizing gives": "im_prefix_length image_token_len",
    "pixels are 8-bit until the model rescales and normalises them in fp32": (
        "image_dtype sft_image_normalize sft_image_rescale"
    ),
    "pictures are resized by Pillow, as in ERNIE's training code": "processor_use_fast",
    "a sample without a token to learn is always left out, and counted": "drop_untrainble_sample",
    "labels are always the tokens that come next": "sft_shift_by_one",
    "its parts come from the model's config.json": (
        "vision_config attn_sep depth embed_dim hidden_act in_channels in_chans mlp_ratio model_type num_heads "
        "patch_size spatial_merge_size spatial_patch_size spatial_conv_size"
    ),
    "the model's config.json says which experts see pictures": "moe_use_hard_gate",
    "recompute decides, for the vision transformer as for the layers": "vit_num_recompute_layers",
    "`packing` fills rows up to max_seq_len": "packing_size",
    "balance_pictures divides them over data ranks": "balanced_image_preprocess",
    "pictures are encoded once, with gradients": "vit_second_fwd_batch_size",
}

# What must be asked for first -> the keys that only that reads.
DETAILS: dict[str, str] = {
    "stage: OCR-VL-SFT": "sft_replace_ids",
}

LATER: dict[str, Later] = {
    "vision_model_name_or_path": Later("a vision transformer from a directory of its own", commands=EVERY),
}

FIXED: dict[str, Fixed] = {
    "variable_resolution": Fixed(
        (True,), "pictures always keep their shape, between min_pixels and max_pixels; remove it"
    ),
    "use_pic_id": Fixed((True,), "the chat template writes `Picture 1:` before a picture, as the models know it"),
}
