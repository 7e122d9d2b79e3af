"""The commands and what each does, one line each."""

HELP = {
    "demo": "Teach the embedded model a new creature, offline, in minutes, and show before and after.",
    "train subject": "Teach a diffusion model your subject from a folder of pictures.",
    "resume": "Go on with a stopped or killed run, exactly where it was.",
    "stop": "Ask a run to write a checkpoint and stop.",
    "sample": "Make pictures with a trained adapter.",
    "export": "Write an adapter as plain LoRA for diffusers, kohya tools or PEFT, and prove the file.",
    "inspect": "Say what a LoRA file is, whether it is sound, and who can load it.",
    "adapters": "List the adapter variants and their options.",
    "doctor": "Show versions, devices, memory and caches, and what is missing.",
    "build-tiny": "Build the embedded models from scratch.",
}
