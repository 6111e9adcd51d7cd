"""The harness: it compares systems under limits, and draws what came of it.

The engine never imports it.

From an experiment's file to a figure:
- what is measured: config, model_config (the schema of conf/); texts (what drafts decode);
- what is read: checkpoints, made by synth (safetensors), gguf and smollm2 (a real model);
- how: runner (cells in turns) -> cell (one record) -> child, in limits (cgroups) -> systems/;
  resident (the compute time of the bound), provenance (where it ran);
- what is kept: records (schema, bound), record_files;
- what is drawn: figures/, and of single experiments batches, drafts, mixtures, reliability,
  overlap; claims (the paper's, judged);
- measured apart from cells: agreement, overlap, perplexity, routing.
"""
