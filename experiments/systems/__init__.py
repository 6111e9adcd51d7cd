"""The systems that are compared, behind one interface, and the process that measures one of them.

Nothing of flexinfer is imported unless flexinfer is the system: its memory is the system's own.

How each system is driven:
- flexinfer: `flexinfer.from_pretrained` with the cell's budget; options are its keyword arguments.
  On a GGUF file it reads the same bytes as llama.cpp, and both multiply them by ggml.
- llama_cpp: the package llama-cpp-python, compiled at installation (4 minutes on two cores) for the
  CPU it runs on. Wheels made elsewhere hold no AVX-512: with one, a resident pass of Llama2-7B in
  Q4_0 took 0.70 s on a CPU that has it. Option use_extra_bufts=false stops repacking, as
  --no-repack does: repacked weights are a copy in memory, so where the model does not fit it is
  killed or hangs. The context is the workload's.
- transformers: `AutoModelForCausalLM.from_pretrained(dtype="auto")`, which maps the safetensors.
- accelerate: the same with device_map="auto" and a CPU allowance of what the budget leaves after
  process, KV cache, one decoder layer and the largest other matrix, which its hooks load to
  compute; option cpu_bytes overrides.
- airllm: AirLLM on a CPU, prefetching on. It splits the checkpoint into a copy beside it, made
  before the clock starts. Synthetic checkpoints have no tokenizer, so the subclass here loads none.
- ollm: `Inference.load_model` on a CPU; what it lacks or refuses is its record.
"""
