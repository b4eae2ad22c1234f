"""Every number of the training in one place."""

from dataclasses import dataclass

# Evaluation draws its scenes and noise from seeds below this, training from it upwards.
FIRST_TRAINING_SEED = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedules; shares are of a stage's minutes."""

    # Budgets of the stages, in minutes of one H200.
    vae_minutes: float = 20
    judge_minutes: float = 6
    text_and_transformer_minutes: float = 60
    causal_minutes: float = 25

    # Models.
    vae_base_dim: int = 32
    vae_z_dim: int = 32
    layers: int = 9
    heads: int = 4
    ffn_dim: int = 704
    text_dim: int = 128
    text_layers: int = 2
    # Autoencoder: until which share of the time which (frames, clips) batches take turns. Short clips first: from the
    # start on 33 frames it collapses to the mean colour; the long ones teach what the causal convolutions hold later.
    curriculum: tuple[tuple[float, tuple[tuple[int, int], ...]], ...] = (
        (0.30, ((5, 48),)),
        (0.50, ((17, 16),)),
        (0.65, ((33, 8),)),
        (1.00, ((33, 8), (65, 4), (9, 24), (33, 8), (129, 2), (5, 48), (33, 8))),
    )
    vae_learning_rate: float = 1e-3
    world_sizes: tuple[tuple[int, int], ...] = ((128, 128), (96, 160))
    pool: int = 128  # rendered clips that are kept, of flat scenes and of each size of the world
    pool_turns: tuple[int, ...] = (0, 1, 2, 1, 2)  # batches of flat scenes (0) and of each size, in turns
    changing_clips: float = 0.15  # share of clips that cross-fade into another scene
    detail_weight: float = 8.0  # what a pixel counts more for each unit (of 2) that it differs from those around it
    latent_noise: float = 0.03  # of each channel's spread, before decoding: sampled latents are never exact
    measured_batches: int = 8  # of `encode_batch` clips, for the latents' mean and spread; clips for the PSNR
    # The small world's judge.
    judge_width: int = 32
    judge_learning_rate: float = 1e-3
    judge_pool: int = 4096  # rendered clips that are kept, of each size
    judge_renewed: int = 7  # a step
    # Latents that the transformer learns from.
    clips: tuple[int, ...] = (1024, 2048, 1536)  # a process, of flat scenes and of each size of the world
    clip_latents: int = 17
    encode_batch: int = 32
    # Transformer and text encoder, one schedule.
    batch: int = 128  # windows of `window` latent frames; fewer longer, more shorter ones
    window: int = 9
    # Batches in turns: clips of which source, latent frames of their windows, and whether these have a history.
    turns: tuple[tuple[int, int, bool], ...] = (
        (1, 9, False),
        (2, 9, False),
        (1, 9, True),
        (0, 9, False),
        (1, 9, False),
        (2, 9, False),
        (1, 17, False),
        (2, 9, True),
        (1, 9, False),
        (2, 9, False),
        (0, 9, True),
        (1, 5, False),
        (0, 9, False),
    )
    learning_rate: float = 1e-3
    muon: bool = True  # for the matrices of the blocks
    renew_every: int = 60  # steps from one renewal of `encode_batch` clips to the next; 0 renews none
    graphs: bool = True  # on a GPU, steps become CUDA graphs
    empty_captions: float = 0.1
    unknown_captions: float = 0.03  # of words that the tokenizer does not know, as many a negative prompt is
    foreign_captions: float = 0.04  # of the other kind of scenes, half of their words unknown: they say nothing here
    unknown_words: float = 0.02
    flow_shift: float = 3.0
    # Half of a batch draws its noise level around the middle; the other half evenly under this larger shift: which
    # colour goes where is settled at the highest levels, which a logit-normal hardly ever draws.
    high_noise_shift: float = 5.0
    history_lengths: tuple[int, ...] = (1, 2, 2, 3, 3, 3, 3, 3, 3, 4)
    history_noise: float = 0.1
    history_tint: float = 0.05  # a constant added to a channel of the history: the slow drift that noise is not
    # The causal transformer: teacher forcing for a share of the minutes, then consistency distillation.
    chunk_size: int = 3  # latent frames, as the windows and sinks below
    causal_window: int = 12
    causal_sink: int = 3
    # Batches in turns: clips of which source, and under which window and sink. Each pair is a shape to compile.
    causal_turns: tuple[tuple[int, int, int], ...] = (
        (1, 12, 3),
        (2, 12, 3),
        (0, 12, 3),
        (1, 9, 3),
        (2, 12, 3),
        (1, 12, 3),
        (0, 9, 3),
        (2, 9, 3),
        (1, 9, 0),
        (0, 12, 3),
    )
    causal_clips: tuple[int, ...] = (1024, 1152, 896)  # a process, of each source
    causal_clip_latents: int = 27  # full windows and sinks far away, as in long streams
    causal_batch: int = 32  # clips
    causal_changes: float = 0.2  # share of clips that change into another scene
    forcing_share: float = 0.5
    forcing_learning_rate: float = 5e-4
    causal_learning_rate: float = 2e-4
    causal_guidance: float = 4.0  # of the teacher; the student needs none
    causal_levels: int = 48  # a multiple of the sampler's steps
    causal_shift: float = 5.0
    # The student sees its own chunks as far as they come from a level at which a clip is still recognised.
    recycled: float = 0.5  # share of clips
    recycled_below: float = 0.7  # noise level
    causal_decay: float = 0.99  # of the averaged weights that make the student's target
    # All.
    first_frame_weight: float = 5.0  # frame 0 of a clip is a latent of its own, the hardest, and all else follows it
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
    text_layers=1,
    curriculum=((0.5, ((5, 2),)), (1.0, ((5, 2), (9, 1)))),
    world_sizes=((16, 16), (16, 32)),
    pool=2,
    judge_width=4,
    judge_pool=2,
    judge_renewed=1,
    clips=(4, 4, 4),
    renew_every=3,
    clip_latents=5,
    window=3,
    turns=((1, 3, False), (2, 5, False), (0, 3, True)),
    history_lengths=(1,),
    causal_turns=((1, 6, 3), (2, 6, 0), (0, 3, 0)),
    causal_clips=(4, 4, 4),
    causal_clip_latents=6,
    causal_batch=4,
    encode_batch=4,
    batch=4,
    save_every_s=2.0,
    log_every_steps=1,
    agree_every_steps=1,
)
