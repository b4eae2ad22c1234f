"""The board of tiers: the entries that later segments reuse, their moves and their losses."""

from monitoring.boards.panel import Dashboard, Row, gauge, growth, panel
from monitoring.boards.query import of, rate, ratio, total

_BYTES, _BUDGET = total(of("tier_bytes"), "tier"), total(of("tier_budget_bytes"), "tier")

_CONTENT = Row(
    "Content",
    (
        panel(
            "Bytes and capacity",
            "The host tier fills up by design; the disk tier loses entries when it is full.",
            "bytes",
            (_BYTES, "{{tier}}"),
            (_BUDGET, "{{tier}}, capacity"),
            (total(of("tier_peak_bytes"), "tier"), "{{tier}}, peak"),
        ),
        panel(
            "Fill",
            "Share of the capacity in use, if it is limited.",
            "percentunit",
            (ratio(_BYTES, _BUDGET), "{{tier}}"),
            above=0.9,
        ),
        gauge("Entries", "Residuals in a tier.", "short", "tier_entries", "tier", stacked=True),
    ),
)
_READS = Row(
    "Reads",
    (
        panel(
            "Hit rate",
            "Share of a tier's lookups that found their entry.",
            "percentunit",
            (ratio(rate("tier_lookups_total", "tier", result="hit"), rate("tier_lookups_total", "tier")), "{{tier}}"),
        ),
        panel(
            "Prefetches per second",
            "Requested prefetches, and ended ones by outcome.",
            "short",
            (rate("prefetches_total", "prefetch"), "{{prefetch}}"),
            (rate("prefetches_requested_total"), "requested"),
        ),
        panel(
            "Prefetches in time",
            "Share of the prefetches that ended before their read.",
            "percentunit",
            (ratio(rate("prefetches_total", prefetch="useful"), rate("prefetches_total")), "in time"),
            below=0.8,
        ),
        growth(
            "Wait",
            "Seconds per second that committed segments waited for late residuals or for a slot.",
            "s",
            "reuse_wait_seconds_total",
            legend="wait",
            above=0.1,
        ),
        growth(
            "Reuse",
            "Residuals that committed segments read and wrote.",
            "Bps",
            "reuse_bytes_total",
            "direction",
            details="cache",
        ),
        growth("Wasted", "Bytes prefetched and not read.", "Bps", "prefetch_wasted_bytes_total", legend="wasted"),
    ),
)


def _move_time(source: str, target: str) -> tuple[str, str]:
    seconds = rate("tier_move_seconds_total", move=f"{source}_to_{target}")
    return ratio(seconds, rate("tier_moves_total", source=source, target=target)), f"{source} to {target}"


_MOVES = Row(
    "Moves and losses",
    (
        panel(
            "Moves",
            "Bytes per second between tiers. Entries are on disk before they are evicted from the host tier.",
            "Bps",
            (rate("tier_moved_bytes_total", "source", "target", "cause"), "{{source}} to {{target}}, {{cause}}"),
        ),
        panel(
            "Move time (mean)",
            "Time from the decision to move an entry to its end.",
            "s",
            _move_time("disk", "host"),
            _move_time("host", "disk"),
        ),
        growth(
            "Dropped entries per second",
            "Entries removed from all tiers; `dead` ones will not be read again.",
            "short",
            *("entries_dropped_total", "reason"),
        ),
        growth(
            "Disk faults per minute",
            "Errors with files of the disk tier.",
            "short",
            "disk_faults_total",
            "fault",
            per_s=60,
            width=12,
            above=1,
        ),
        growth(
            "Refusals per minute",
            "Requests that the CacheStore refused.",
            "short",
            "refusals_total",
            "refusal",
            per_s=60,
            width=12,
        ),
    ),
)

DASHBOARD = Dashboard("tiers", "Tiers", "The content of the tiers, moves and losses.", (_CONTENT, _READS, _MOVES))
