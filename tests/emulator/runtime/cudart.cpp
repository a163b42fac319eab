// A stand-in for the CUDA runtime: what nvcc's host code and our launchers call. Launches go to Python, which runs the
// PTX in the image on the emulator; limits are checked as the real runtime does.
#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

#include "stand_in.h"

StandIn stand_in{};

namespace {

constexpr size_t kSharedByDefault = 48 * 1024;

struct Function {
    const void* fatbin;
    std::string name;
    size_t shared_allowed = kSharedByDefault;
};

struct Configuration {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};

std::map<const void*, Function>& functions() {
    static auto* all = new std::map<const void*, Function>;   // registered before main, needed until the end
    return *all;
}

thread_local std::vector<Configuration> configurations;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t told(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

bool possible(dim3 grid, dim3 block, dim3 cluster) {
    const auto within = [](dim3 d, uint64_t x, uint64_t y, uint64_t z) {
        return d.x > 0 && d.y > 0 && d.z > 0 && d.x <= x && d.y <= y && d.z <= z;
    };
    return within(grid, 0x7fffffff, 65535, 65535) && within(block, 1024, 1024, 64) &&
           uint64_t(block.x) * block.y * block.z <= 1024 && grid.x % cluster.x == 0 && grid.y % cluster.y == 0 &&
           grid.z % cluster.z == 0;
}

cudaError_t launch(const void* function, const Configuration& c, dim3 cluster, bool clustered, void** args) {
    const auto found = functions().find(function);
    if (found == functions().end()) return told(cudaErrorInvalidDeviceFunction);
    const Function& f = found->second;
    if (!possible(c.grid, c.block, cluster)) return told(cudaErrorInvalidConfiguration);
    if (c.shared_bytes > f.shared_allowed) return told(cudaErrorInvalidValue);
    if (!stand_in.launch) return told(cudaErrorNoDevice);
    const char* broken = nullptr;
    if (uint64_t(c.stream) != kStream) broken = "launched on a stream that is not torch's current one";
    if (stand_in.guards == 0) broken = "launched without a device guard";
    const uint32_t x = clustered ? cluster.x : 0;   // 0: as the kernel says
    const StandInLaunch request{f.fatbin,
                                f.name.c_str(),
                                {c.grid.x, c.grid.y, c.grid.z},
                                {c.block.x, c.block.y, c.block.z},
                                {x, cluster.y, cluster.z},
                                c.shared_bytes,
                                args,
                                broken};
    return told(cudaError_t(stand_in.launch(&request)));
}

}  // namespace

extern "C" {

// ---- what nvcc writes into host code ----

void** __cudaRegisterFatBinary(void* wrapper) {
    struct Wrapper {
        int magic, version;
        const void* data;
    };
    return static_cast<void**>(const_cast<void*>(static_cast<Wrapper*>(wrapper)->data));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** fatbin, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
    functions()[host] = {fatbin, name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
    configurations.push_back({grid, block, shared_bytes, static_cast<cudaStream_t>(stream)});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
    const Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid;
    *block = c.block;
    *shared_bytes = c.shared_bytes;
    *static_cast<cudaStream_t*>(stream) = c.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes,
                               cudaStream_t stream) {
    return launch(kernel, {grid, block, shared_bytes, stream}, dim3(1, 1, 1), false, args);
}

// ---- the runtime ----

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared_bytes,
                             cudaStream_t stream) {
    return launch(function, {grid, block, shared_bytes, stream}, dim3(1, 1, 1), false, args);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
    dim3 cluster(1, 1, 1);
    bool clustered = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttribute& a = config->attrs[i];
        if (a.id != cudaLaunchAttributeClusterDimension) continue;
        cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
        clustered = true;
    }
    const Configuration c{config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream};
    return launch(function, c, cluster, clustered, args);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    const auto found = functions().find(function);
    if (found == functions().end()) return told(cudaErrorInvalidDeviceFunction);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > stand_in.shared_limit) return told(cudaErrorInvalidValue);
    found->second.shared_allowed = size_t(value) > kSharedByDefault ? size_t(value) : kSharedByDefault;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void* function) {
    const auto found = functions().find(function);
    if (found == functions().end()) return told(cudaErrorInvalidDeviceFunction);
    const int threads = stand_in.threads ? stand_in.threads(found->second.fatbin, found->second.name.c_str()) : 0;
    if (threads <= 0) return told(cudaErrorInvalidDeviceFunction);
    *to = {};
    to->maxThreadsPerBlock = threads;
    to->maxDynamicSharedSizeBytes = int(found->second.shared_allowed);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = stand_in.processors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = stand_in.capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = stand_in.capability % 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = stand_in.shared_limit; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(kSharedByDefault); break;
        default: return told(cudaErrorNotSupported);
    }
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDeviceFunction: return "invalid device function";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorLaunchFailure: return "unspecified launch failure";
        default: return "error of the stand-in for the CUDA runtime";
    }
}

}  // extern "C"
