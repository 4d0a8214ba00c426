// Arguments of every forward kernel. Mirrors `KernelParams` in crates/swiglu-runtime/src/launch.rs.

struct Params {
    const void* x;          // [m, k]
    const void* gate;       // [n, k] (k_major) or [k, n] (n_major)
    const void* up;         // like gate
    const void* gate_bias;  // [n], or null
    const void* up_bias;    // [n], or null
    void* z;                // [m, n]
    void* saved_gate;       // [m, n], forward_save only: x Wg + bg
    void* saved_up;         // [m, n], forward_save only: x Wu + bu
    i64 x_stride;           // elements from row to row
    i64 gate_stride;
    i64 up_stride;
    i64 z_stride;
    i64 saved_gate_stride;
    i64 saved_up_stride;
    int m, n, k;
    int raster_along_n;     // 0: blocks walk down M first; 1: along N first
    int raster_group;       // tiles walked before stepping in the other direction
};

enum class Op { forward, forward_save };
enum class WeightMajor { k_major, n_major };
enum class Output { z, gate, up };  // what a kernel stores: forward z only
