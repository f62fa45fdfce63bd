"""What a run leaves on disk: meta, trace, summary, diagnostics."""
