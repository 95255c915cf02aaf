/* A libcuda for machines without a GPU: a Hopper that runs nothing and remembers what it was asked to.

   It has what jaxlib's Mosaic compiler, and the host code that it makes, call. Nothing of CUDA's headers
   is needed: types and numbers are the driver's binary interface. `recorded` is read through ctypes
   (tests/no_gpu/worker.py has the same layout). Anything else that is asked for fails to resolve.

       cc -shared -fPIC -o libcuda.so.1 recorder.c
*/
#include <stdint.h>
#include <string.h>

#define MAX_PARAMETERS 64
#define MAX_MAPS 16
enum { SUCCESS = 0, INVALID_IMAGE = 200, INVALID_VALUE = 1 };
enum { MAJOR = 75, MINOR = 76, MAX_DYNAMIC_SHARED = 8 };

typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    struct { int id, padding; uint64_t value[8]; } *attributes;
    unsigned num_attributes;
} LaunchConfig;

struct {
    int num_parameters; /* set by the reader: how many the next launches pass */
    int modules, launches, most_shared_bytes;
    unsigned grid[3], block[3], cluster[3], shared_bytes, programmatic;
    uint64_t stream, parameters[MAX_PARAMETERS];
    char entry[256];
    int num_maps; /* TMA descriptors that were encoded */
    struct {
        int dtype, rank, interleave, swizzle, promotion, fill;
        uint64_t address, sizes[5], strides[5];
        unsigned box[5], steps[5];
    } maps[MAX_MAPS];
} recorded;

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
int cuModuleUnload(void *module) { return SUCCESS; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == MAJOR ? 9 : 0; /* compute capability 9.0 */
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = "an error of the recording libcuda";
    return SUCCESS;
}

int cuModuleLoadData(void **module, const void *image) {
    if (memcmp(image, "\177ELF", 4) != 0)
        return INVALID_IMAGE; /* PTX, say: ptxas did not run */
    recorded.modules++;
    *module = (void *)2;
    return SUCCESS;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    strncpy(recorded.entry, name, sizeof recorded.entry - 1);
    *function = (void *)3;
    return SUCCESS;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute == MAX_DYNAMIC_SHARED)
        recorded.most_shared_bytes = value;
    return SUCCESS;
}

/* Leaves the description's number, plus MAP, where the descriptor would be. */
enum { MAP = 0x7A0000 };
int cuTensorMapEncodeTiled(uint64_t *map, int dtype, unsigned rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const unsigned *box, const unsigned *steps,
                           int interleave, int swizzle, int promotion, int fill) {
    int k = recorded.num_maps++;
    if (k >= MAX_MAPS || rank < 1 || rank > 5 || (uintptr_t)map % 64)
        return INVALID_VALUE;
    recorded.maps[k].dtype = dtype;
    recorded.maps[k].rank = (int)rank;
    recorded.maps[k].interleave = interleave;
    recorded.maps[k].swizzle = swizzle;
    recorded.maps[k].promotion = promotion;
    recorded.maps[k].fill = fill;
    recorded.maps[k].address = (uint64_t)address;
    for (unsigned i = 0; i < rank; i++) {
        recorded.maps[k].sizes[i] = sizes[i];
        recorded.maps[k].strides[i] = i + 1 < rank ? strides[i] : 0;
        recorded.maps[k].box[i] = box[i];
        recorded.maps[k].steps[i] = steps[i];
    }
    memset(map, 0, 128);
    map[0] = MAP + (uint64_t)k;
    return SUCCESS;
}

int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    if (function != (void *)3 || extra || recorded.num_parameters > MAX_PARAMETERS)
        return INVALID_VALUE;
    recorded.launches++;
    memcpy(recorded.grid, config->grid, sizeof recorded.grid);
    recorded.cluster[0] = recorded.cluster[1] = recorded.cluster[2] = 1;
    memcpy(recorded.block, config->block, sizeof recorded.block);
    recorded.shared_bytes = config->shared_bytes;
    recorded.stream = (uint64_t)config->stream;
    recorded.programmatic = 0;
    for (unsigned i = 0; i < config->num_attributes; i++)
        if (config->attributes[i].id == 6) /* programmatic stream serialization */
            recorded.programmatic = (unsigned)config->attributes[i].value[0];
        else if (config->attributes[i].id == 4) /* cluster dimension */
            memcpy(recorded.cluster, config->attributes[i].value, sizeof recorded.cluster);
    for (int i = 0; i < recorded.num_parameters; i++)
        recorded.parameters[i] = *(uint64_t *)parameters[i];
    return SUCCESS;
}
