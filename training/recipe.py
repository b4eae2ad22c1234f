"""Every number of the training in one place."""

from dataclasses import dataclass

# Evaluation draws its scenes and noise from seeds below this, training from it upwards.
FIRST_TRAINING_SEED = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedules; shares are of a stage's minutes."""

    # Models.
    vae_base_dim: int = 16
    vae_z_dim: int = 16
    layers: int = 8
    heads: int = 3
    ffn_dim: int = 768
    text_dim: int = 64
    # Autoencoder: until which share of the time which (frames, clips) batches take turns. Short clips first: from the
    # start on 33 frames it collapses to the mean colour; the long ones teach what the causal convolutions hold later.
    curriculum: tuple[tuple[float, tuple[tuple[int, int], ...]], ...] = (
        (0.20, ((5, 48),)),
        (0.40, ((17, 16),)),
        (0.60, ((33, 8),)),
        (1.00, ((33, 8), (65, 4), (33, 8), (129, 2))),
    )
    vae_learning_rate: float = 1e-3
    world_sizes: tuple[tuple[int, int], ...] = ((128, 128), (96, 160))
    world_pool: int = 256  # clips of each size that are kept
    pool_turns: tuple[int | None, ...] = (None, 0, 1, 0)  # batches of flat scenes (None) and of each size
    changing_clips: float = 0.15  # share of clips that cross-fade into another scene
    latent_noise: float = 0.03  # of each channel's spread, before decoding: sampled latents are never exact
    measured_batches: int = 8  # of `encode_batch` clips, for the latents' mean and spread; clips for the PSNR
    # Latents that the transformer learns from.
    clips: int = 12_288  # a process
    clip_latents: int = 17
    encode_batch: int = 32
    # Transformer and text encoder, one schedule.
    batch: int = 128
    window: int = 9  # latent frames
    learning_rate: float = 1e-3
    empty_captions: float = 0.1
    history_batches: tuple[bool, ...] = (False, False, True, False, False, False)  # in turns
    flow_shift: float = 3.0
    # Half of a batch draws its noise level around the middle; the other half evenly under this larger shift: which
    # colour goes where is settled at the highest levels, which a logit-normal hardly ever draws.
    high_noise_shift: float = 5.0
    first_frame_weight: float = 5.0  # latent 0 of a clip stands for one frame, is the hardest, and all else follows it
    history_lengths: tuple[int, ...] = (1, 2, 2, 3, 3, 3, 3, 3, 3, 4)
    history_noise: float = 0.1
    history_tint: float = 0.05  # a constant added to a channel of the history: the slow drift that noise is not
    # Both.
    ema_decay: float = 0.999
    warmup_steps: int = 100
    save_every_s: float = 120.0
    log_every_steps: int = 100
    agree_every_steps: int = 10  # how often the processes agree on the time that is left


FULL = Recipe()
# For a look at whether everything runs, in seconds on a CPU.
SMOKE = Recipe(
    vae_base_dim=4,
    layers=1,
    heads=1,
    ffn_dim=64,
    curriculum=((0.5, ((5, 2),)), (1.0, ((5, 2), (9, 1)))),
    world_sizes=((16, 16), (16, 32)),
    world_pool=2,
    clips=8,
    encode_batch=4,
    batch=2,
    save_every_s=2.0,
    log_every_steps=1,
    agree_every_steps=1,
)
