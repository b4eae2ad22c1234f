"""The board of streams and media."""

from monitoring.boards.panel import Dashboard, Row, gauge, growth, panel
from monitoring.boards.query import mean, of, quantile

_STREAM = Row(
    "Stream",
    (
        gauge("Consumers", "Clients that wait for a segment.", "short", "stream_consumers", legend="clients", width=12),
        panel(
            "Lag",
            "Committed segments that no client has taken, in the run with the most.",
            "short",
            (f"max({of('stream_lag_segments')})", "segments"),
            width=12,
        ),
    ),
)
_MEDIA = Row(
    "Media",
    (
        panel(
            "Decoding and encoding (mean)",
            "Time from a segment's latents to its frames, and from its frames to its file.",
            "s",
            *((mean("work_seconds", stage=stage), stage) for stage in ("decode", "encode")),
        ),
        growth("Media", "Bytes of video per second.", "Bps", "media_bytes_total", legend="media"),
        panel(
            "Seam score (mean, p95)",
            "Visibility of the seams between segments; 0 is seamless.",
            "short",
            (mean("seam_score"), "mean"),
            (quantile(0.95, "seam_score"), "p95"),
        ),
    ),
)

DASHBOARD = Dashboard("media", "Stream and media", "Streams, their lag, and media.", (_STREAM, _MEDIA))
