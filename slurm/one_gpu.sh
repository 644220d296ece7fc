#!/bin/bash
# The chain on one GPU, requeued until it is done.
#   mkdir -p runs && sbatch slurm/one_gpu.sh
#SBATCH --job-name=race
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180      # three minutes ahead of the limit: a step and a save take seconds
#SBATCH --requeue                # also after a node failed or was taken away
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log

source "${SLURM_SUBMIT_DIR:-.}/slurm/chain.sh"
