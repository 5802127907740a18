// sum = the sum of n floats (n a multiple of 4): vector loads, a tree in shared memory, shuffles, and the block that
// comes last adds what the others left in `partial`, in their order. `arrived` is 0 before and after.
constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    reduction(const float* x, float* partial, int* arrived, float* sum, int n) {
    __shared__ float tree[THREADS];
    __shared__ bool last;
    int t = threadIdx.x;
    float s = 0;
    for (int i = (blockIdx.x * THREADS + t) * 4; i < n; i += gridDim.x * THREADS * 4) {
        float4 v = *reinterpret_cast<const float4*>(x + i);
        s += (v.x + v.y) + (v.z + v.w);
    }
    tree[t] = s;
    __syncthreads();
    for (int half = THREADS / 2; half >= 32; half /= 2) {
        if (t < half) tree[t] += tree[t + half];
        __syncthreads();
    }
    if (t < 32) {
        s = tree[t];
        for (int step = 16; step; step /= 2) s += __shfl_xor_sync(0xffffffff, s, step);
        if (t == 0) partial[blockIdx.x] = s;
    }
    if (t == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1) == int(gridDim.x) - 1;
        __threadfence();
    }
    __syncthreads();
    if (last && t == 0) {
        s = 0;
        for (int i = 0; i < int(gridDim.x); i++) s += partial[i];
        *sum = s;
        *arrived = 0;
    }
}
