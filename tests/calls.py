"""What tests call a pipeline with."""

TINY = {
    "prompt": "a red circle",
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 32,
    "output_type": "latent",
    "return_dict": False,
}
"""The least that a random model makes."""

AS_TRAINED = {
    "prompt": "a red circle and a blue square bouncing on a black background",
    "height": 128,
    "width": 128,
    "num_frames": 33,
    "guidance_scale": 4.0,
    "output_type": "latent",
    "return_dict": False,
}
"""A prompt and sizes that the embedded model was trained on."""
