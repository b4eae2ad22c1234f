"""What viewers get."""

from monitoring.boards.panel import Dashboard, Panel, Row, Target
from monitoring.boards.query import mean, of, quantile, rate, total

_STREAM = Row(
    "Stream",
    (
        Panel(
            "Consumers",
            "Clients that wait for a segment.",
            "short",
            (Target(total(of("stream_consumers")), "consumers"),),
            width=12,
        ),
        Panel(
            "Lag",
            "Committed segments that no client has taken, of the run where they are most.",
            "short",
            (Target(f"max({of('stream_lag_segments')})", "segments"),),
            width=12,
        ),
    ),
)
_MEDIA = Row(
    "Media",
    (
        Panel(
            "Decoding and encoding",
            "The mean time that a segment's latents take to become frames, and its frames to become a file.",
            "s",
            (
                Target(mean("work_seconds", stage="decode"), "decode"),
                Target(mean("work_seconds", stage="encode"), "encode"),
            ),
        ),
        Panel(
            "Media",
            "Bytes of video a second of wall time.",
            "Bps",
            (Target(rate("media_bytes_total"), "media"),),
        ),
        Panel(
            "Joins",
            "How visible the joins of segments are; 0 is seamless.",
            "short",
            (
                Target(mean("seam_score"), "mean"),
                Target(quantile(0.95, "seam_score"), "p95"),
            ),
        ),
    ),
)

DASHBOARD = Dashboard("media", "Stream and media", "What viewers get.", (_STREAM, _MEDIA))
