#!/bin/bash
# Pretrain on several nodes of a Slurm cluster: sbatch configs/slurm.sh [flags of train_gpt2.py]
# The run folder must be on a file system that all nodes share. A job that is requeued or submitted
# again resumes from its latest checkpoint. Slurm sends SIGTERM 120 s before the time limit, and
# training then saves a checkpoint and exits.
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue

# Without this, ranks that torchrun restarts may hang: https://github.com/pytorch/pytorch/issues/135712
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max_restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head_node:29500" \
    train_gpt2.py "$@"
