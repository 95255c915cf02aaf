// What compute-sanitizer's racecheck sees of a stage that one warpgroup writes and another one reads.
//
//     nvcc -arch=sm_90a -lineinfo -o racecheck tests/gpu/racecheck.cu
//     for form in 0 1 2 3; do compute-sanitizer --tool racecheck ./racecheck $form; done
//
// In each form the writer waits for an mbarrier that says that the stage has been read. It is told by
//   0  every thread that reads
//   1  one thread, behind a meeting of the warpgroup (bar.sync): as safe as 0
//   2  one thread for each CTA of a cluster, behind the meeting: Mosaic's collective barriers, as our kernels use them
//   3  every thread that reads, at its own CTA's address in the cluster
// racecheck 2025.3.1 (H200, 2026-11-30) finds nothing in 0 and 3, and reports a race in 1 and 2: it does not follow
// the order that the meeting makes between the other threads' reads and the one thread's arrival.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ void arrive_in(uint64_t* barrier, uint32_t cta) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "  mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(address(barrier)),
      "r"(cta)
      : "memory");
}

__device__ void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address(barrier)), "r"(parity)
        : "memory");
}

__device__ void meet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

__device__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

template <int FORM>
__global__ void __cluster_dims__(2) stage(const float* x, float* out, int steps) {
  __shared__ float values[128];
  __shared__ uint64_t full, empty;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    init(&full, 128);
    init(&empty, FORM == 1 ? 1 : FORM == 2 ? 2 : 128);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  meet_cluster();
  if (threadIdx.x < 128) {  // reads
    float sum = 0;
    for (int k = 0; k < steps; ++k) {
      wait(&full, k & 1);
      sum += values[(thread + 37) % 128];
      if (FORM == 1 || FORM == 2) meet();
      if (FORM == 0 || (FORM == 1 && thread == 0)) arrive(&empty);
      if (FORM == 2 && thread % 8 == 0 && thread / 8 < 2) arrive_in(&empty, thread / 8);
      if (FORM == 3) arrive_in(&empty, rank);
    }
    out[blockIdx.x * 128 + thread] = sum;
  } else {  // writes
    for (int k = 0; k < steps; ++k) {
      if (k) wait(&empty, (k - 1) & 1);
      values[thread] = x[k * 128 + thread];
      arrive(&full);
    }
  }
  meet_cluster();
}

int main(int argc, char** argv) {
  using Form = void (*)(const float*, float*, int);
  const Form forms[] = {stage<0>, stage<1>, stage<2>, stage<3>};
  const int steps = 16, form = argc > 1 ? atoi(argv[1]) : 0;
  if (form < 0 || form > 3) return 2;
  float *x, *out;
  cudaMalloc(&x, steps * 128 * sizeof(float));
  cudaMemset(x, 0, steps * 128 * sizeof(float));
  cudaMalloc(&out, 2 * 128 * sizeof(float));
  forms[form]<<<2, 256>>>(x, out, steps);
  const cudaError_t error = cudaDeviceSynchronize();
  printf("form %d: %s\n", form, cudaGetErrorString(error));
  return error != cudaSuccess;
}
