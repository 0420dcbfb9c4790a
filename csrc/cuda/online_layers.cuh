// Phases of online SGD: the layers on their own.
#pragma once

#include "online_step.cuh"
#include "window.cuh"

namespace mnist_ops::cuda {

template <typename T>
__device__ void activation(const Phase& p, const Step<T>& s) {
  const T* x = s.map(p.x);
  each_element(p, s, p.C * p.H * p.W,
               [&](int32_t i) { s.at(p.y)[i] = activation_value(p.activation, x[i]); });
}

template <typename T>
__device__ void activation_backward(const Phase& p, const Step<T>& s) {
  each_element(p, s, p.C * p.H * p.W, [&](int32_t i) {
    s.at(p.dx)[i] = activation_gradient(p.activation, s.at(p.dy)[i], s.at(p.y)[i]);
  });
}

// Forward and backward are the same: the random numbers come drawn, in the order (C, H, W).
template <typename T>
__device__ void dropout(const Phase& p, const Step<T>& s) {
  const T* from = s.map(p.x);
  const double* uniform = s.uniform(p.first_uniform);
  const int32_t pixels = p.H * p.W;
  each_element(p, s, p.C * pixels, [&](int32_t i) {
    s.at(p.y)[i] = from[i] * dropout_factor<T>(uniform[i % p.C * pixels + i / p.C], p.number);
  });
}

// Between the order (H, W, C) of a map and (C, H, W) of a vector; flip: from the vector to the map.
template <typename T>
__device__ void permute(const Phase& p, const Step<T>& s) {
  const int32_t pixels = p.H * p.W;
  const T* from = p.flip ? s.at(p.dy) : s.map(p.x);
  T* to = p.flip ? s.at(p.dx) : s.at(p.y);
  each_element(p, s, p.C * pixels, [&](int32_t i) {
    const int32_t in_map = map_index(i, p.C, pixels);
    to[p.flip ? in_map : i] = from[p.flip ? i : in_map];
  });
}

// body(x) for the elements of a window.
template <typename T, typename F>
__device__ __forceinline__ void each_of_window(const T* plane, const PoolGeometryOf<int32_t>& g,
                                               int32_t oh, int32_t ow, const F& body) {
  for (int32_t ih = g.first_row(oh); ih < g.last_row(oh); ++ih) {
    for (int32_t iw = g.first_column(ow); iw < g.last_column(ow); ++iw) {
      body(plane[ih * g.in_h + iw * g.in_w]);
    }
  }
}

// Whether (ih, iw) is the first element of the window that equals its largest one, or NaN.
template <typename T>
__device__ bool is_first_maximum(const T* plane, const PoolGeometryOf<int32_t>& g, T largest,
                                 int32_t oh, int32_t ow, int32_t ih, int32_t iw) {
  for (int32_t h = g.first_row(oh); h <= ih; ++h) {
    for (int32_t w = g.first_column(ow); w < g.last_column(ow); ++w) {
      const T a = plane[h * g.in_h + w * g.in_w];
      if (a == largest || a != a) return h == ih && w == iw;
    }
  }
  return false;
}

// A thread a window.
template <typename T>
__device__ void pool(const Phase& p, const Step<T>& s) {
  const PoolGeometryOf<int32_t> g = pool_geometry_of(p);
  const T* x = s.map(p.x);
  const T norm_type = static_cast<T>(p.number);
  each_element(p, s, p.C * p.OH * p.OW, [&](int32_t i) {
    const int32_t pixel = i / p.C, oh = pixel / p.OW, ow = pixel % p.OW;
    const T* plane = x + i % p.C;
    T y = T(0);
    if (p.pool == PoolKind::kMax) {
      y = -std::numeric_limits<T>::infinity();
      each_of_window(plane, g, oh, ow, [&](T a) { y = is_larger(a, y) ? a : y; });
    } else if (p.pool == PoolKind::kAverage) {
      each_of_window(plane, g, oh, ow, [&](T a) { y += a; });
      y /= window_divisor<T>(g, oh, ow, p.count_padding != 0, p.divisor);
    } else {
      with_norm(AnyNorm{}, norm_type, [&](auto tag) {
        y = window_norm<decltype(tag)::value>(plane, g, norm_type, oh, ow);
      });
    }
    s.at(p.y)[i] = y;
  });
}

// A thread an input element: it adds up the windows that hold it.
template <typename T>
__device__ void pool_backward(const Phase& p, const Step<T>& s) {
  const PoolGeometryOf<int32_t> g = pool_geometry_of(p);
  const T norm_type = static_cast<T>(p.number);
  each_element(p, s, p.C * p.H * p.W, [&](int32_t i) {
    const int32_t pixel = i / p.C, ih = pixel / p.W, iw = pixel % p.W, c = i % p.C;
    const T *x = s.map(p.x) + c, *y = s.at(p.y) + c, *dy = s.at(p.dy) + c;
    T sum = T(0);
    if (p.pool == PoolKind::kLp) {
      with_norm(AnyNorm{}, norm_type, [&](auto tag) {
        sum = input_gradient<decltype(tag)::value>(dy, x, y, g, norm_type, ih, iw);
      });
      s.at(p.dx)[i] = sum;
      return;
    }
    for (int32_t oh = g.first_window(ih); oh < g.last_window(ih); ++oh) {
      for (int32_t ow = g.first_window_column(iw); ow < g.last_window_column(iw); ++ow) {
        const int32_t o = oh * g.out_h + ow * g.out_w;
        if (p.pool == PoolKind::kAverage) {
          sum += dy[o] / window_divisor<T>(g, oh, ow, p.count_padding != 0, p.divisor);
        } else if (is_first_maximum(x, g, y[o], oh, ow, ih, iw)) {
          sum += dy[o];
        }
      }
    }
    s.at(p.dx)[i] = sum;
  });
}

}  // namespace mnist_ops::cuda
